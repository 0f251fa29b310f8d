// The passes over maps that a fused merge makes, for CPUs; cpu_kernels.py documents them. Compiled when first used.
//
// A map is N images of C channels and P pixels. Channels last, a row is a pixel and the loop over its channels is the
// vectorised one, so that sums over pixels accumulate element by element; else a row is the plane of one channel.
// Sums and coefficients are (N, C), of type A; map elements are read, computed in A and rounded once.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("tree-loop-vectorize")  // torch.compile, which vectorises by itself, switches it off
#endif
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
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
    bool last;
    int threads;
};

// Calls work(map offset, coefficient offset, rows, row stride, lanes) for parts that have coefficients of their own.
template <typename Work>
static void for_each_part(const Shape& s, const Work& work) {
    // an image at a time reads memory in order; fewer images than threads are cut into bands of channels
    const int64_t lanes = s.last ? (s.N < s.threads ? std::min<int64_t>(64, s.C) : s.C) : 1;
    const int64_t parts = (s.C + lanes - 1) / lanes;
    const int threads = s.N * s.C * s.P < 32768 ? 1 : s.threads;
    #pragma omp parallel for collapse(2) num_threads(threads)
    for (int64_t n = 0; n < s.N; ++n) {
        for (int64_t k = 0; k < parts; ++k) {
            const int64_t c = k * lanes;
            if (s.last) work((n * s.P) * s.C + c, n * s.C + c, s.P, s.C, std::min(lanes, s.C - c));
            else work((n * s.C + c) * s.P, n * s.C + c, 1, s.P, s.P);
        }
    }
}

// Channels last, sums are made of those of BLOCK rows, for their errors grow with the number of terms. At the end of a
// block its sum is added to the total, and cleared; the last becomes the total.
constexpr int64_t BLOCK = 128;

template <typename A>
static inline void end_block(A* sum, A* total, int64_t lanes, bool last) {
    #pragma omp simd
    for (int64_t i = 0; i < lanes; ++i) {
        total[i] += sum[i];
        sum[i] = last ? total[i] : A(0);
    }
}

// Of deviations, for E[x²] - E[x]² loses all digits where the mean is large; from a mean and not from one pixel, for that
// may be an outlier.
template <bool with_var, typename T, typename A>
static void moments(Shape s, const T* x_, A* mean_, A* var_) {
    const int64_t step = std::max<int64_t>(1, std::min<int64_t>(s.P, 4 * std::sqrt(s.P)));
    for_each_part(s, [&](int64_t map, int64_t coef, int64_t rows, int64_t stride, int64_t lanes) {
        const T* x = x_ + map;
        A *mean = mean_ + coef, *var = with_var ? var_ + coef : nullptr;
        if (s.last) {
            // from the mean so far, that of 1, 16, 144 ... pixels
            std::vector<A> so_far(lanes), squares(with_var ? lanes : 0);
            A *m = so_far.data(), *total = squares.data();
            for (int64_t i = 0; i < lanes; ++i) mean[i] = 0;
            if (with_var) for (int64_t i = 0; i < lanes; ++i) var[i] = 0;
            for (int64_t start = 0, end; start < rows; start = end) {
                end = std::min(rows, start + std::min(std::max<int64_t>(15 * start, 1), BLOCK));
                for (int64_t row = start; row < end; ++row, x += stride) {
                    #pragma omp simd
                    for (int64_t i = 0; i < lanes; ++i) {
                        const A d = A(x[i]) - m[i];
                        mean[i] += d;
                        if (with_var) var[i] += d * d;
                    }
                }
                #pragma omp simd
                for (int64_t i = 0; i < lanes; ++i) {
                    const A change = mean[i] / end;
                    m[i] += change;
                    if (with_var) total[i] += var[i] - mean[i] * change;
                    mean[i] = end == rows ? m[i] : A(0);
                    if (with_var) var[i] = end == rows ? std::max(total[i] / rows, A(0)) : A(0);
                }
            }
        } else {
            // from the mean of a few pixels
            A m = 0, sum = 0, squares = 0;
            for (int64_t i = step / 2; i < lanes; i += step) m += A(x[i]);
            m /= (lanes - step / 2 + step - 1) / step;
            #pragma omp simd reduction(+ : sum, squares)
            for (int64_t i = 0; i < lanes; ++i) {
                const A d = A(x[i]) - m;
                sum += d;
                if (with_var) squares += d * d;
            }
            const A rest = sum / lanes;
            if (with_var) *var = std::max(squares / lanes - rest * rest, A(0));
            *mean = m + rest;
        }
    });
}

template <typename T, typename A>
static void moments_backward(Shape s, T* grad_, const T* x_, const A* scale_, const A* shift_) {
    for_each_part(s, [&](int64_t map, int64_t coef, int64_t rows, int64_t stride, int64_t lanes) {
        T* grad = grad_ + map;
        const T* x = x_ + map;
        const A *scale = scale_ + coef, *shift = shift_ + coef;
        for (int64_t row = 0; row < rows; ++row, grad += stride, x += stride) {
            if (s.last) {
                #pragma omp simd
                for (int64_t i = 0; i < lanes; ++i) grad[i] = A(grad[i]) + (scale[i] * A(x[i]) + shift[i]);
            } else {
                const A q = *scale, r = *shift;
                #pragma omp simd
                for (int64_t i = 0; i < lanes; ++i) grad[i] = A(grad[i]) + (q * A(x[i]) + r);
            }
        }
    });
}

// The same expression forward and backward, so that both agree where the ReLU is active. NaN passes, as in torch.
template <bool two, typename A>
static inline A affine(A a, A u, A b, A v, A c) { return two ? a * u + (b * v + c) : a * u + c; }

template <bool two, bool relu, typename T, typename A>
static void affine_act(Shape s, const T* u_, const T* v_, const A* a_, const A* b_, const A* c_, T* y_, A* pooled_) {
    for_each_part(s, [&](int64_t map, int64_t coef, int64_t rows, int64_t stride, int64_t lanes) {
        const T *u = u_ + map, *v = two ? v_ + map : u;
        const A *a = a_ + coef, *b = two ? b_ + coef : a, *c = c_ + coef;
        T* y = y_ + map;
        A* pooled = pooled_ + coef;
        const auto element = [&](int64_t i, A a, A b, A c) {
            const A t = affine<two>(a, A(u[i]), b, A(v[i]), c);
            const A r = relu && t <= 0 ? A(0) : t;
            y[i] = r;
            return r;
        };
        if (s.last) {
            std::vector<A> total(lanes);
            for (int64_t i = 0; i < lanes; ++i) pooled[i] = 0;
            for (int64_t row = 1; row <= rows; ++row, u += stride, v += stride, y += stride) {
                #pragma omp simd
                for (int64_t i = 0; i < lanes; ++i) pooled[i] += element(i, a[i], b[i], c[i]);
                if (row % BLOCK == 0 || row == rows) end_block(pooled, total.data(), lanes, row == rows);
            }
            for (int64_t i = 0; i < lanes; ++i) pooled[i] /= s.P;
        } else {
            const A a0 = *a, b0 = *b, c0 = *c;
            A sum = 0;
            #pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < lanes; ++i) sum += element(i, a0, b0, c0);
            *pooled = sum / s.P;
        }
    });
}

template <bool two, bool relu, typename T, typename A>
static void affine_act_backward(
        Shape s, const T* grad_, const A* grad_pooled_, const T* u_, const T* v_, const A* a_, const A* b_, const A* c_,
        T* grad_u_, T* grad_v_, A* grad_a_, A* grad_b_, A* grad_c_) {
    for_each_part(s, [&](int64_t map, int64_t coef, int64_t rows, int64_t stride, int64_t lanes) {
        const T *grad = grad_ + map, *u = u_ + map, *v = two ? v_ + map : u;
        const A *a = a_ + coef, *b = two ? b_ + coef : a, *c = c_ + coef, *grad_pooled = grad_pooled_ + coef;
        T *grad_u = grad_u_ ? grad_u_ + map : nullptr, *grad_v = grad_v_ ? grad_v_ + map : nullptr;
        A *grad_a = grad_a_ + coef, *grad_b = two ? grad_b_ + coef : nullptr, *grad_c = grad_c_ + coef;
        const auto masked = [&](int64_t i, A a, A b, A c, A mean) {
            const A t = affine<two>(a, A(u[i]), b, A(v[i]), c);
            return relu && t <= 0 ? A(0) : A(grad[i]) + mean;
        };
        if (s.last) {
            std::vector<A> total_a(lanes), total_b(two ? lanes : 0), total_c(lanes);
            for (int64_t i = 0; i < lanes; ++i) grad_a[i] = grad_c[i] = 0;
            if (two) for (int64_t i = 0; i < lanes; ++i) grad_b[i] = 0;
            for (int64_t row = 1; row <= rows; ++row, grad += stride, u += stride, v += stride) {
                #pragma omp simd
                for (int64_t i = 0; i < lanes; ++i) {
                    const A g = masked(i, a[i], b[i], c[i], grad_pooled[i] / s.P);
                    grad_c[i] += g;
                    grad_a[i] += g * A(u[i]);
                    if (two) grad_b[i] += g * A(v[i]);
                    if (grad_u_) grad_u[i] = a[i] * g;
                    if (two && grad_v_) grad_v[i] = b[i] * g;
                }
                if (grad_u_) grad_u += stride;
                if (grad_v_) grad_v += stride;
                if (row % BLOCK == 0 || row == rows) {
                    end_block(grad_a, total_a.data(), lanes, row == rows);
                    end_block(grad_c, total_c.data(), lanes, row == rows);
                    if (two) end_block(grad_b, total_b.data(), lanes, row == rows);
                }
            }
        } else {
            const A a0 = *a, b0 = *b, c0 = *c, mean = *grad_pooled / s.P;
            A sum_a = 0, sum_b = 0, sum_c = 0;
            #pragma omp simd reduction(+ : sum_a, sum_b, sum_c)
            for (int64_t i = 0; i < lanes; ++i) {
                const A g = masked(i, a0, b0, c0, mean);
                sum_c += g;
                sum_a += g * A(u[i]);
                if (two) sum_b += g * A(v[i]);
                if (grad_u_) grad_u[i] = a0 * g;
                if (two && grad_v_) grad_v[i] = b0 * g;
            }
            *grad_a = sum_a;
            *grad_c = sum_c;
            if (two) *grad_b = sum_b;
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
    extern "C" void moments_backward_##name(SHAPE, T* grad, const T* x, const A* scale, const A* shift) {          \
        moments_backward<T, A>({N, C, P, last != 0, threads}, grad, x, scale, shift);                              \
    }                                                                                                              \
    extern "C" void affine_act_##name(                                                                             \
            SHAPE, int relu, const T* u, const T* v, const A* a, const A* b, const A* c, T* y, A* pooled) {        \
        CALL(affine_act, u, v, a, b, c, y, pooled);                                                                \
    }                                                                                                              \
    extern "C" void affine_act_backward_##name(                                                                    \
            SHAPE, int relu, const T* grad, const A* grad_pooled, const T* u, const T* v, const A* a, const A* b,  \
            const A* c, T* grad_u, T* grad_v, A* grad_a, A* grad_b, A* grad_c) {                                   \
        CALL(affine_act_backward, grad, grad_pooled, u, v, a, b, c, grad_u, grad_v, grad_a, grad_b, grad_c);       \
    }

EXPORT(float32, float, float)
EXPORT(float64, double, double)
EXPORT(bfloat16, bfloat16, float)
