// The kernels for CPUs; __init__.py documents them. Compiled when first used.
//
// A map is N images of C channels and P pixels, of type T; coefficients and sums are (N, C), of type A. Elements of maps
// are computed in A and rounded once.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("tree-loop-vectorize")  // torch.compile, which vectorises by itself, switches it off
#endif
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

struct bfloat16 {
    uint16_t bits;

    operator float() const {
        uint32_t word = uint32_t(bits) << 16;
        float value;
        std::memcpy(&value, &word, sizeof value);
        return value;
    }

    bfloat16& operator=(float value) {
        uint32_t word;
        std::memcpy(&word, &value, sizeof word);
        bits = value != value ? 0x7fc0 : uint16_t((word + 0x7fff + ((word >> 16) & 1)) >> 16);  // to nearest even
        return *this;
    }
};

struct Shape {
    int64_t N, C, P;
    bool last;  // channels last, else contiguous
    int threads;

    int64_t index(int64_t n, int64_t c, int64_t p) const { return last ? (n * P + p) * C + c : (n * C + c) * P + p; }
};

template <int64_t n>
using Constant = std::integral_constant<int64_t, n>;

constexpr int64_t BLOCK = 128;  // rows that are summed up by themselves, for errors grow with their number

// Rows of lanes in a map, from an offset on. The compiler unrolls lanes that are a Constant.
template <typename Lanes>
struct Rows {
    int64_t offset, rows, stride;
    Lanes lanes;
};

template <int O, typename A, typename Lanes, typename Body>
static void in_blocks(const Rows<Lanes>& r, const A** in, A** out, const Body& body) {
    std::vector<A> totals(r.rows > BLOCK ? O * r.lanes : 0);
    for (int64_t row = 0; row < r.rows; row += BLOCK) {
        body(Rows<Lanes>{r.offset + row * r.stride, std::min(BLOCK, r.rows - row), r.stride, r.lanes}, in, out);
        for (int o = 0; o < O && r.rows > BLOCK; ++o) {
            if (!out[o]) continue;
            A *sum = out[o], *total = totals.data() + o * r.lanes;
            const bool last = row + BLOCK >= r.rows;
            #pragma omp simd
            for (int64_t i = 0; i < r.lanes; ++i) {
                total[i] += sum[i];
                sum[i] = last ? total[i] : A(0);
            }
        }
    }
}

// A row is several pixels of a few channels. Coefficients are repeated for each; lanes of the same channel are added up
// in the end, in an order that no compiler and no choice of outputs changes.
template <int CAP, int I, int O, typename A, typename Channels, typename Lanes, typename Body>
static void in_packed_rows(
        int64_t offset, int64_t pixels, Channels channels, Lanes lanes, const A* const (&inputs)[I],
        A* const (&outputs)[O], int64_t coef, const Body& body) {
    A spread[I][CAP], sums[O][CAP] = {};
    const A* in[I];
    A* out[O];
    for (int i = 0; i < I; ++i) {
        in[i] = spread[i];
        for (int64_t lane = 0; lane < lanes; lane += channels) {
            for (int64_t c = 0; c < channels; ++c) spread[i][lane + c] = inputs[i][coef + c];
        }
    }
    for (int o = 0; o < O; ++o) out[o] = sums[o];
    const int64_t rows = pixels * channels / lanes, rest = pixels * channels % lanes;
    if (rows) in_blocks<O>(Rows<Lanes>{offset, rows, lanes, lanes}, in, out, body);
    if (rest) body(Rows<int64_t>{offset + rows * lanes, 1, 0, rest}, in, out);
    for (int o = 0; o < O; ++o) {
        if (!outputs[o]) continue;
        for (int64_t n = lanes / channels, half; n > 1; n -= half) {
            half = n / 2;
            const A* upper = sums[o] + (n - half) * channels;
            #pragma omp simd
            for (int64_t i = 0; i < half * channels; ++i) sums[o][i] += upper[i];
        }
        std::copy(sums[o], sums[o] + channels, outputs[o] + coef);
    }
}

// Calls body(rows, coefficients, sums) for all of a map. Of every input and output, (N, C), body gets an array of as many
// elements as a row has lanes, and adds to the outputs. Channels last, a row is a pixel and a lane a channel. But few
// channels last, and the plane of a channel, are packed.
template <int I, int O, typename A, typename Body>
static void for_rows(const Shape& s, const A* const (&inputs)[I], A* const (&outputs)[O], const Body& body) {
    // an image at a time reads memory in order; fewer images than threads are cut into bands of channels
    const bool packed = s.C <= 32;
    const int64_t width = !s.last ? 1 : packed || s.N >= s.threads ? s.C : std::min<int64_t>(64, s.C);
    const int64_t bands = (s.C + width - 1) / width;
    #pragma omp parallel for collapse(2) num_threads(s.N * s.C * s.P < 32768 ? 1 : s.threads)
    for (int64_t n = 0; n < s.N; ++n) {
        for (int64_t band = 0; band < bands; ++band) {
            const int64_t c = band * width, offset = s.index(n, c, 0), coef = n * s.C + c;
            if (!s.last) {
                in_packed_rows<16>(offset, s.P, Constant<1>{}, Constant<16>{}, inputs, outputs, coef, body);
            } else if (packed) {
                in_packed_rows<64>(offset, s.P, s.C, 64 / s.C * s.C, inputs, outputs, coef, body);
            } else {
                const int64_t lanes = std::min(width, s.C - c);
                const A* in[I];
                A* out[O];
                for (int i = 0; i < I; ++i) in[i] = inputs[i] + coef;
                for (int o = 0; o < O; ++o) {
                    out[o] = outputs[o] ? outputs[o] + coef : nullptr;
                    if (out[o]) std::fill(out[o], out[o] + lanes, A(0));
                }
                in_blocks<O>(Rows<int64_t>{offset, s.P, s.C, lanes}, in, out, body);
            }
        }
    }
}

template <bool with_var, typename T, typename A>
static void moments(const Shape& s, const T* x, A* mean, A* var) {
    // of deviations from something near the mean, for E[x²] - E[x]² loses all digits where the mean is large
    std::vector<A> shift(s.N * s.C);
    if (with_var) {
        const int64_t samples = std::min<int64_t>(8, s.P);
        #pragma omp parallel for num_threads(s.N * s.C * s.P < 32768 ? 1 : s.threads)
        for (int64_t n = 0; n < s.N; ++n) {
            for (int64_t k = 0; k < samples; ++k) {
                for (int64_t c = 0; c < s.C; ++c) {
                    shift[n * s.C + c] += A(x[s.index(n, c, (2 * k + 1) * s.P / (2 * samples))]) / samples;
                }
            }
        }
    }
    for_rows<1, 2, A>(s, {shift.data()}, {mean, with_var ? var : nullptr}, [=](auto r, const A** in, A** out) {
        const A* shift = in[0];
        A *sum = out[0], *squares = out[1];
        const T* x_ = x + r.offset;
        for (int64_t row = 0; row < r.rows; ++row, x_ += r.stride) {
            #pragma omp simd
            for (int64_t i = 0; i < r.lanes; ++i) {
                const A d = A(x_[i]) - shift[i];
                sum[i] += d;
                if (with_var) squares[i] += d * d;
            }
        }
    });
    for (int64_t i = 0; i < s.N * s.C; ++i) {
        const A m = mean[i] / s.P;
        mean[i] = shift[i] + m;
        if (with_var) var[i] = std::max(var[i] / s.P - m * m, A(0));
    }
}

template <bool scaled, typename T, typename A>
static void add_affine(const Shape& s, T* grad, const T* x, const A* scale, const A* shift) {
    for_rows<2, 1, A>(s, {scaled ? scale : shift, shift}, {nullptr}, [=](auto r, const A** in, A**) {
        const A *scale = in[0], *shift = in[1];
        T* grad_ = grad + r.offset;
        const T* x_ = scaled ? x + r.offset : grad_;
        for (int64_t row = 0; row < r.rows; ++row, grad_ += r.stride, x_ += r.stride) {
            #pragma omp simd
            for (int64_t i = 0; i < r.lanes; ++i) {
                grad_[i] = A(grad_[i]) + (scaled ? scale[i] * A(x_[i]) + shift[i] : shift[i]);
            }
        }
    });
}

// The same expression forward and backward, so that both agree on where the ReLU is active.
template <bool two, typename A>
static inline A affine(A a, A u, A b, A v, A c) { return two ? a * u + (b * v + c) : a * u + c; }

template <bool two, bool relu, typename T, typename A>
static void affine_act(const Shape& s, const T* u, const T* v, const A* a, const A* b, const A* c, T* y) {
    for_rows<3, 1, A>(s, {a, two ? b : a, c}, {nullptr}, [=](auto r, const A** in, A**) {
        const A *a = in[0], *b = in[1], *c = in[2];
        const T *u_ = u + r.offset, *v_ = two ? v + r.offset : u_;
        T* y_ = y + r.offset;
        for (int64_t row = 0; row < r.rows; ++row, u_ += r.stride, v_ += r.stride, y_ += r.stride) {
            #pragma omp simd
            for (int64_t i = 0; i < r.lanes; ++i) {
                const A t = affine<two>(a[i], A(u_[i]), b[i], A(v_[i]), c[i]);
                y_[i] = relu && t <= 0 ? A(0) : t;  // NaN passes, as in torch
            }
        }
    });
}

template <bool two, bool relu, typename T, typename A>
static void affine_act_backward(
        const Shape& s, const T* grad, const T* u, const T* v, const A* a, const A* b, const A* c,
        T* grad_u, T* grad_v, A* grad_a, A* grad_b, A* grad_c) {
    for_rows<3, 3, A>(
            s, {a, two ? b : a, c}, {grad_a, two ? grad_b : nullptr, grad_c}, [=](auto r, const A** in, A** out) {
        const A *a = in[0], *b = in[1], *c = in[2];
        A *sum_a = out[0], *sum_b = out[1], *sum_c = out[2];
        const T *grad_ = grad + r.offset, *u_ = u + r.offset, *v_ = two ? v + r.offset : u_;
        T *grad_u_ = grad_u + r.offset, *grad_v_ = two ? grad_v + r.offset : nullptr;
        for (int64_t row = 0; row < r.rows; ++row) {
            #pragma omp simd
            for (int64_t i = 0; i < r.lanes; ++i) {
                const A t = affine<two>(a[i], A(u_[i]), b[i], A(v_[i]), c[i]);
                const A g = relu && t <= 0 ? A(0) : A(grad_[i]);
                sum_a[i] += g * A(u_[i]);
                if (two) sum_b[i] += g * A(v_[i]);
                sum_c[i] += g;
                grad_u_[i] = a[i] * g;
                if (two) grad_v_[i] = b[i] * g;
            }
            grad_ += r.stride, u_ += r.stride, v_ += r.stride, grad_u_ += r.stride;
            if (two) grad_v_ += r.stride;
        }
    });
}

#define SHAPE int64_t N, int64_t C, int64_t P, int last, int threads
#define CALL(function, ...)                                                                                        \
    do {                                                                                                           \
        const Shape s{N, C, P, last != 0, threads};                                                                \
        v ? relu ? function<true, true>(s, __VA_ARGS__) : function<true, false>(s, __VA_ARGS__)                    \
          : relu ? function<false, true>(s, __VA_ARGS__) : function<false, false>(s, __VA_ARGS__);                 \
    } while (0)
#define EXPORT(name, T, A)                                                                                         \
    extern "C" void moments_##name(SHAPE, const T* x, A* mean, A* var) {                                           \
        const Shape s{N, C, P, last != 0, threads};                                                                \
        var ? moments<true>(s, x, mean, var) : moments<false>(s, x, mean, var);                                    \
    }                                                                                                              \
    extern "C" void add_affine_##name(SHAPE, T* grad, const T* x, const A* scale, const A* shift) {                \
        const Shape s{N, C, P, last != 0, threads};                                                                \
        scale ? add_affine<true>(s, grad, x, scale, shift) : add_affine<false>(s, grad, x, scale, shift);          \
    }                                                                                                              \
    extern "C" void affine_act_##name(                                                                             \
            SHAPE, int relu, const T* u, const T* v, const A* a, const A* b, const A* c, T* y) {                   \
        CALL(affine_act, u, v, a, b, c, y);                                                                        \
    }                                                                                                              \
    extern "C" void affine_act_backward_##name(                                                                    \
            SHAPE, int relu, const T* grad, const T* u, const T* v, const A* a, const A* b, const A* c,            \
            T* grad_u, T* grad_v, A* grad_a, A* grad_b, A* grad_c) {                                               \
        CALL(affine_act_backward, grad, u, v, a, b, c, grad_u, grad_v, grad_a, grad_b, grad_c);                    \
    }

EXPORT(float32, float, float)
EXPORT(float64, double, double)
EXPORT(bfloat16, bfloat16, float)
