// A merge on CPUs, forward and backward: docs/method.md. Compiled when first used, for one type of maps at a time:
// cpu.py defines MAP, its type, and WIDE, that of sums and coefficients.
//
// A map is N images of C channels and P pixels; coefficients and sums are (N, C). Elements of maps are computed in WIDE
// and rounded once.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("tree-loop-vectorize")  // torch.compile, which vectorises by itself, switches it off
#ifdef __AVX512F__
#pragma GCC target("prefer-vector-width=512")  // its default is 256: on a Xeon half as fast for bfloat16
#endif
#endif
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <type_traits>
#include <vector>

// Without branches, which c10::BFloat16 has: loops with those are not vectorised, and take up to ten times as long.
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

using T = MAP;
using A = WIDE;

struct Shape {
    int64_t N, C, P;
    bool last;  // channels last, else contiguous
    int64_t threads;

    int64_t useful_threads() const { return N * C * P < 32768 ? 1 : threads; }

    int64_t index(int64_t n, int64_t c, int64_t p) const { return last ? (n * P + p) * C + c : (n * C + c) * P + p; }
};

template <int64_t n>
using Constant = std::integral_constant<int64_t, n>;

constexpr int64_t CAP = 640;  // lanes of a row of several pixels
constexpr int64_t CACHED = 200'000;  // bytes of a map that are merged at a time, beside one image: a cache holds them
constexpr int64_t BLOCK = 128;  // rows that are summed up by themselves, for errors grow with their number

// Rows of lanes in a map, from an offset on. The compiler unrolls lanes that are a Constant.
template <typename Lanes>
struct Rows {
    int64_t offset, rows, stride;
    Lanes lanes;
};

// Calls body(lane, index in the map).
template <typename Lanes, typename Body>
static inline void each(const Rows<Lanes>& r, const Body& body) {
    for (int64_t row = 0, start = r.offset; row < r.rows; ++row, start += r.stride) {
        #pragma omp simd
        for (int64_t i = 0; i < r.lanes; ++i) body(i, start + i);
    }
}

template <int O, typename Lanes, typename Body>
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
template <int CAP, int I, int O, typename Channels, typename Lanes, typename Body>
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

// Calls body(rows, coefficients, sums) for all of a map. Of every input and output, (N, C), body gets an array of as
// many elements as a row has lanes, and adds to the outputs. Channels last, a row is a pixel and a lane a channel. But
// few channels last, and the plane of a channel, are packed.
template <int I, int O, typename Body>
static void for_rows(const Shape& s, const A* const (&inputs)[I], A* const (&outputs)[O], const Body& body) {
    // an image at a time reads memory in order; fewer images than threads are cut into bands of channels
    int64_t lanes = s.C * 16 / std::gcd(s.C, int64_t(16));  // of bfloat16, what is left over is not vectorised
    lanes *= std::max<int64_t>(1, 256 / lanes);
    const bool packed = s.C <= 32 || (lanes <= CAP && s.N >= s.threads);
    const int64_t width = !s.last ? 1 : packed || s.N >= s.threads ? s.C : std::min<int64_t>(64, s.C);
    const int64_t bands = (s.C + width - 1) / width;
    #pragma omp parallel for collapse(2) num_threads(s.useful_threads())
    for (int64_t n = 0; n < s.N; ++n) {
        for (int64_t band = 0; band < bands; ++band) {
            const int64_t c = band * width, offset = s.index(n, c, 0), coef = n * s.C + c;
            if (!s.last) {
                in_packed_rows<16>(offset, s.P, Constant<1>{}, Constant<16>{}, inputs, outputs, coef, body);
            } else if (64 % s.C == 0) {
                in_packed_rows<64>(offset, s.P, s.C, Constant<64>{}, inputs, outputs, coef, body);
            } else if (packed) {
                in_packed_rows<CAP>(offset, s.P, s.C, lanes, inputs, outputs, coef, body);
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

template <bool with_var>
static void moments(const Shape& s, const T* x, A* mean, A* var) {
    // sums deviations from something near the mean: E[x²] - E[x]² loses all digits where the mean is large
    std::vector<A> shift(s.N * s.C);
    if (with_var) {
        const int64_t samples = std::min<int64_t>(8, s.P);
        #pragma omp parallel for num_threads(s.useful_threads())
        for (int64_t n = 0; n < s.N; ++n) {
            for (int64_t k = 0; k < samples; ++k) {
                for (int64_t c = 0; c < s.C; ++c) {
                    shift[n * s.C + c] += A(x[s.index(n, c, (2 * k + 1) * s.P / (2 * samples))]) / samples;
                }
            }
        }
    }
    for_rows<1, 2>(s, {shift.data()}, {mean, with_var ? var : nullptr}, [=](auto r, const A** in, A** out) {
        each(r, [=, shift = in[0], sum = out[0], squares = out[1]](int64_t i, int64_t j) {
            const A d = A(x[j]) - shift[i];
            sum[i] += d;
            if (with_var) squares[i] += d * d;
        });
    });
    for (int64_t i = 0; i < s.N * s.C; ++i) {
        const A m = mean[i] / s.P;
        mean[i] = shift[i] + m;
        if (with_var) var[i] = std::max(var[i] / s.P - m * m, A(0));
    }
}

// The same expression forward and backward, so that both agree on where the ReLU is active.
template <bool two>
static inline A affine(A a, A u, A b, A v, A c) { return two ? a * u + (b * v + c) : a * u + c; }

// The gradient is an argument, so that it is always read: AVX2 cannot read 16 bits under a mask.
template <bool relu>
static inline A through_relu(A grad, A t) { return relu && t <= 0 ? A(0) : grad; }

// Arrays are (N, C), (N, D) and so on.
struct Merge {
    A eps;
    const int64_t* sizes;
    const void* const* in;
    A* saved;  // a, b, c and the moments of the maps, (6, batch, C)
    T* result;  // the merged map or the gradient of u; a concatenation is put together there
    const Shape s;  // of the images that this one merges
    const int64_t first = 0;  // number of the first of them

    // sizes: batch, channels, pixels, channels last, threads, ReLU, sum, hidden features, paths, channels of each path.
    // in: W1, W2, gamma, beta, running mean and variance or null, backward saved and the gradient, paths
    const bool relu = sizes[5], is_sum = sizes[6];
    const int64_t N = s.N, C = s.C, E = sizes[7], K = sizes[8], *channels = sizes + 9;
    T* y = result + first * C * s.P;
    const T *u = is_sum ? path(0) : y, *v = is_sum ? path(1) : nullptr;
    const A *w1 = array(0), *w2 = array(1), *gamma = array(2), *beta = array(3);
    const A *running_mean = array(4), *running_var = array(5);
    const int64_t size = sizes[0] * C;
    A *a = saved + first * C, *b = a + size, *c = b + size, *mean = c + size, *var = mean + size, *other = var + size;
    const int64_t D = v ? 2 * C : C;  // features

    using Array = std::vector<A>;
    Array mu = Array(C), sigma2 = Array(C), k = Array(C), t = Array(C);  // BatchNorm is k·x + t
    Array z = Array(N * D), h = Array(N * E), scale = Array(N * K), slope = Array(N * K);  // slope: of log σ
    Array w = Array(N * C);  // of u's channels, the scale of their path
    Array grad_k, grad_t, grad_var, grad_mean;
    Array weighed_mean = Array(v ? 0 : N * C), weighed_var = Array(v || running_mean ? 0 : N * C);

    const A* array(int i) const { return (const A*)in[i]; }

    const T* path(int64_t i) const { return (const T*)in[8 + i] + first * channels[i] * s.P; }

    bool is_small() const { return N * D * E < 65536; }

    template <typename Body>
    void for_all(const Body& body) const {
        for (int64_t n = 0; n < N; ++n) {
            #pragma omp simd
            for (int64_t c = 0; c < C; ++c) body(n, c, n * C + c);
        }
    }

    template <typename Body>
    void for_paths(const Body& body) const {  // of u
        for (int64_t n = 0; n < N; ++n) {
            for (int64_t path = 0, i = n * C; i < (n + 1) * C; i += channels[path++]) {
                body(n * K + path, i, i + channels[path]);
            }
        }
    }

    template <typename Body>
    void with_constants(const Body& body) const {  // whether there are two maps, and a ReLU
        const std::true_type yes;
        const std::false_type no;
        v ? relu ? body(yes, yes) : body(yes, no) : relu ? body(no, yes) : body(no, no);
    }

    void concatenate() const {
        const int64_t rows = N * (s.last ? s.P : 1), width = s.last ? 1 : s.P;
        #pragma omp parallel for num_threads(s.useful_threads())
        for (int64_t row = 0; row < rows; ++row) {
            T* to = y + row * C * width;
            for (int64_t i = 0; i < K; ++i) {
                const int64_t n = channels[i] * width;
                to = std::copy_n(path(i) + row * n, n, to);
            }
        }
    }

    void forward(A* stats) {
        if (!v) concatenate();
        running_mean ? moments<false>(s, u, mean, nullptr) : moments<true>(s, u, mean, var);
        if (v) moments<false>(s, v, other, nullptr);
        infer();
        for_all([&](int64_t, int64_t j, int64_t i) { a[i] = w[i] * k[j], c[i] = v ? w[i] * t[j] : t[j]; });
        if (v) for_all([&](int64_t n, int64_t, int64_t i) { b[i] = scale[n * K + 1]; });
        if (!running_mean) std::copy(sigma2.begin(), sigma2.end(), std::copy(mu.begin(), mu.end(), stats));
        with_constants([&](auto two, auto relu) { affine_act<two(), relu()>(); });
    }

    // m and variance are those of what is normalised
    void normalise(const A* m, const A* variance) {
        if (running_mean) {
            mu.assign(running_mean, running_mean + C), sigma2.assign(running_var, running_var + C);
        } else {
            for_all([&](int64_t, int64_t c, int64_t i) { mu[c] += m[i] / N; });
            for_all([&](int64_t, int64_t c, int64_t i) {
                sigma2[c] += (variance[i] + (m[i] - mu[c]) * (m[i] - mu[c])) / N;
            });
        }
        for (int64_t c = 0; c < C; ++c) {
            k[c] = gamma[c] / std::sqrt(sigma2[c] + eps);
            t[c] = beta[c] - mu[c] * k[c];
        }
    }

    // z -> scale and slope
    void mix() {
        #pragma omp parallel for num_threads(is_small() ? 1 : s.threads)
        for (int64_t n = 0; n < N; n += 4) {  // four images at once, the last repeated, keep the processor busy
            const A* rows[4];
            for (int64_t i = 0; i < 4; ++i) rows[i] = &z[std::min(n + i, N - 1) * D];
            for (int64_t e = 0; e < E; ++e) {
                const A* w = w1 + e * D;
                A sum0 = 0, sum1 = 0, sum2 = 0, sum3 = 0;
                #pragma omp simd reduction(+ : sum0, sum1, sum2, sum3)
                for (int64_t d = 0; d < D; ++d) {
                    sum0 += w[d] * rows[0][d], sum1 += w[d] * rows[1][d];
                    sum2 += w[d] * rows[2][d], sum3 += w[d] * rows[3][d];
                }
                const A sums[4] = {sum0, sum1, sum2, sum3};
                for (int64_t i = 0; i < 4 && n + i < N; ++i) h[(n + i) * E + e] = sums[i] <= 0 ? A(0) : sums[i];
            }
        }
        for (int64_t n = 0; n < N; ++n) {
            A *log_sigma = &scale[n * K], *e = log_sigma, largest = -INFINITY, total = 0;
            for (int64_t i = 0; i < K; ++i) {
                A l = 0;
                for (int64_t j = 0; j < E; ++j) l += w2[i * E + j] * h[n * E + j];
                const A exp = std::exp(-std::abs(l));
                slope[n * K + i] = (l < 0 ? A(1) : exp) / (1 + exp);
                log_sigma[i] = std::min(l, A(0)) - std::log1p(exp);
                largest = std::max(largest, log_sigma[i]);
            }
            for (int64_t i = 0; i < K; ++i) total += e[i] = std::exp(log_sigma[i] - largest);
            for (int64_t i = 0; i < K; ++i) e[i] = K * e[i] / total;
        }
    }

    // moments -> BatchNorm and λ
    void infer() {
        if (v) normalise(mean, var);
        for_all([&](int64_t n, int64_t c, int64_t i) { z[n * D + c] = v ? mean[i] * k[c] + t[c] : mean[i]; });
        if (v) for_all([&](int64_t n, int64_t c, int64_t i) { z[n * D + C + c] = other[i]; });
        mix();
        for_paths([&](int64_t path, int64_t begin, int64_t end) { std::fill(&w[begin], &w[end], scale[path]); });
        if (v) return;
        for_all([&](int64_t, int64_t, int64_t i) { weighed_mean[i] = w[i] * mean[i]; });
        if (!running_mean) for_all([&](int64_t, int64_t, int64_t i) { weighed_var[i] = w[i] * w[i] * var[i]; });
        normalise(weighed_mean.data(), weighed_var.data());
    }

    template <bool two, bool relu>
    void affine_act() const {
        for_rows<3, 1>(
                s, {a, two ? b : a, c}, {nullptr}, [=, y = y, u = u, v = two ? v : u](auto r, const A** in, A**) {
            each(r, [=, a = in[0], b = in[1], c = in[2]](int64_t i, int64_t j) {
                const A t = affine<two>(a[i], A(u[j]), b[i], A(v[j]), c[i]);
                y[j] = relu && t <= 0 ? A(0) : t;  // NaN passes, as in torch
            });
        });
    }

    template <bool two, bool relu>
    void affine_act_sums(const T* grad, A* grad_a, A* grad_b, A* grad_c) const {
        for_rows<3, 3>(
                s, {a, two ? b : a, c}, {grad_a, two ? grad_b : nullptr, grad_c},
                [=, u = u, v = two ? v : u](auto r, const A** in, A** out) {
            const A *a = in[0], *b = in[1], *c = in[2];
            each(r, [=, sum_a = out[0], sum_b = out[1], sum_c = out[2]](int64_t i, int64_t j) {
                const A t = affine<two>(a[i], A(u[j]), b[i], A(v[j]), c[i]);
                const A g = through_relu<relu>(A(grad[j]), t);
                sum_a[i] += g * A(u[j]);
                if (two) sum_b[i] += g * A(v[j]);
                sum_c[i] += g;
            });
        });
    }

    // a · ḡ + scale · u + shift and b · ḡ + shift_v
    template <bool two, bool relu>
    void affine_act_grads(const T* grad, const A* scale, const A* shift, const A* shift_v, T* grad_v) const {
        for_rows<6, 1>(
                s, {a, two ? b : a, c, scale, shift, two ? shift_v : a}, {nullptr},
                [=, grad_u = y, u = u, v = two ? v : u](auto r, const A** in, A**) {
            const A *a = in[0], *b = in[1], *c = in[2], *scale = in[3], *shift = in[4], *shift_v = in[5];
            each(r, [=](int64_t i, int64_t j) {
                const A t = affine<two>(a[i], A(u[j]), b[i], A(v[j]), c[i]);
                const A g = through_relu<relu>(A(grad[j]), t);
                grad_u[j] = a[i] * g + (scale[i] * A(u[j]) + shift[i]);
                if (two) grad_v[j] = b[i] * g + shift_v[i];
            });
        });
    }

    // Gradients through statistics; m is the mean of what is normalised. Adds to grad_mean; grad_var is one for all.
    void normalise_backward(const A* m, A* grad_gamma, A* grad_beta) {
        for (int64_t c = 0; c < C; ++c) {
            const A r = 1 / std::sqrt(sigma2[c] + eps), grad = grad_k[c] - mu[c] * grad_t[c];
            grad_gamma[c] = r * grad;
            grad_beta[c] = grad_t[c];
            grad_var[c] = running_mean ? A(0) : -gamma[c] * r * r * r * grad / (2 * N);
        }
        if (!running_mean) for_all([&](int64_t, int64_t c, int64_t i) {
            grad_mean[i] += 2 * grad_var[c] * (m[i] - mu[c]) - k[c] * grad_t[c] / N;
        });
    }

    // Adds to all but the first.
    void mix_backward(const A* grad_scale, A* grad_z, A* grad_w1, A* grad_w2) const {
        Array grad_l(N * K), grad_h(N * E);
        #pragma omp parallel num_threads(is_small() ? 1 : s.threads)
        {
            #pragma omp for
            for (int64_t n = 0; n < N; ++n) {
                A inner = 0;
                for (int64_t i = n * K; i < n * K + K; ++i) inner += grad_scale[i] * scale[i] / K;
                for (int64_t i = n * K; i < n * K + K; ++i) grad_l[i] = scale[i] * (grad_scale[i] - inner) * slope[i];
                for (int64_t e = 0; e < E; ++e) {
                    if (h[n * E + e] <= 0) continue;
                    A grad = 0;
                    for (int64_t i = 0; i < K; ++i) grad += grad_l[n * K + i] * w2[i * E + e];
                    grad_h[n * E + e] = grad;
                    #pragma omp simd
                    for (int64_t d = 0; d < D; ++d) grad_z[n * D + d] += grad * w1[e * D + d];
                }
            }
            #pragma omp for
            for (int64_t e = 0; e < E; ++e) {
                for (int64_t n = 0; n < N; ++n) {
                    #pragma omp simd
                    for (int64_t d = 0; d < D; ++d) grad_w1[e * D + d] += grad_h[n * E + e] * z[n * D + d];
                    for (int64_t i = 0; i < K; ++i) grad_w2[i * E + e] += grad_l[n * K + i] * h[n * E + e];
                }
            }
        }
    }

    // grad_w1 and grad_w2 start at zero.
    void backward(const T* grad, T* grad_v, A* grad_w1, A* grad_w2, A* grad_gamma, A* grad_beta) {
        if (!v) concatenate();
        Array grad_a(N * C), grad_b(N * C), grad_c(N * C);
        with_constants([&](auto two, auto relu) {
            affine_act_sums<two(), relu()>(grad, grad_a.data(), grad_b.data(), grad_c.data());
        });
        infer();
        Array grad_w(N * C), grad_scale(N * K), grad_z(N * D);
        grad_k.resize(C), grad_t.resize(C), grad_var.resize(C), grad_mean.resize(N * C);
        for_all([&](int64_t, int64_t c, int64_t i) {
            grad_w[i] = grad_a[i] * k[c] + (v ? grad_c[i] * t[c] : A(0));
            grad_k[c] += grad_a[i] * w[i];
            grad_t[c] += v ? grad_c[i] * w[i] : grad_c[i];
        });
        if (!v) {
            normalise_backward(weighed_mean.data(), grad_gamma, grad_beta);
            for_all([&](int64_t, int64_t c, int64_t i) {
                grad_w[i] += grad_mean[i] * mean[i];
                if (!running_mean) grad_w[i] += 2 * w[i] * var[i] * grad_var[c];
            });
        }
        for_paths([&](int64_t path, int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) grad_scale[path] += grad_w[i];
        });
        if (v) for (int64_t i = 0; i < N * C; ++i) grad_scale[i / C * K + 1] += grad_b[i];
        mix_backward(grad_scale.data(), grad_z.data(), grad_w1, grad_w2);
        for_all([&](int64_t n, int64_t c, int64_t i) {
            grad_mean[i] = grad_z[n * D + c] * (v ? k[c] : A(1)) + (v ? A(0) : grad_mean[i] * w[i]);
        });
        if (v) {
            for_all([&](int64_t n, int64_t c, int64_t i) {
                grad_k[c] += grad_z[n * D + c] * mean[i];
                grad_t[c] += grad_z[n * D + c];
            });
            normalise_backward(mean, grad_gamma, grad_beta);
        }
        Array u_scale(N * C), u_shift(N * C), v_shift(N * C);
        for_all([&](int64_t n, int64_t c, int64_t i) {
            u_scale[i] = 2 * grad_var[c] / s.P * (v ? A(1) : w[i] * w[i]);
            u_shift[i] = grad_mean[i] / s.P - u_scale[i] * mean[i];
            if (v) v_shift[i] = grad_z[n * D + C + c] / s.P;
        });
        with_constants([&](auto two, auto relu) {
            affine_act_grads<two(), relu()>(grad, u_scale.data(), u_shift.data(), v_shift.data(), grad_v);
        });
    }
};

static Shape shape(const int64_t* sizes) { return {sizes[0], sizes[1], sizes[2], sizes[3] != 0, sizes[4]}; }

extern "C" void merge(double eps, const int64_t* sizes, const void* const* in, void* const* out) {
    const Shape s = shape(sizes);
    const auto merge = [&](const Shape& part, int64_t first) {
        Merge{A(eps), sizes, in, (A*)out[0], (T*)out[1], part, first}.forward((A*)out[2]);
    };
    const int64_t threads = s.useful_threads();
    if (!in[4] || s.N < threads) return merge(s, 0);
    // With running statistics images do not depend on each other: a few at a time, they stay in the cache.
    const int64_t few = std::min((s.N + threads - 1) / threads, 1 + CACHED / int64_t(s.C * s.P * sizeof(T)));
    #pragma omp parallel for num_threads(threads)
    for (int64_t n = 0; n < s.N; n += few) merge({std::min(few, s.N - n), s.C, s.P, s.last, 1}, n);
}

extern "C" void merge_backward(double eps, const int64_t* sizes, const void* const* in, void* const* out) {
    Merge{A(eps), sizes, in, (A*)in[6], (T*)out[0], shape(sizes)}.backward(
        (const T*)in[7], (T*)out[1], (A*)out[2], (A*)out[3], (A*)out[4], (A*)out[5]);
}
