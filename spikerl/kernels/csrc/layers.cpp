// One layer at a time, for networks that no single call covers: products of spikes and weights, and neurons' scans.

#include "backward_events.h"
#include "encoder.h"
#include "forward_events.h"

namespace {

// Words of one sample's spikes, (T, K) with `stride` between steps.
void pack_words(const float* spikes, int64_t stride, int64_t K, int T, int32_t* words) {
    std::memset(words, 0, padded(K) * sizeof(int32_t));
    for (int t = 0; t < T; t++, spikes += stride)
        for (int64_t k = 0; k < K; k++) words[k] |= int32_t(uint32_t(spikes[k] > 0.5f) << t);
}

// Copies the drive gradients of one sample to `to` (T, Np), from rows of N with `stride` between steps; `active_steps`
// (Np): the number of steps up to the last at which a neuron's gradient is not 0.
void take_gradients(const float* grad, int64_t stride, int64_t N, int T, float* to, int32_t* active_steps) {
    const int64_t Np = padded(N);
    std::memset(active_steps, 0, Np * sizeof(int32_t));
    for (int t = 0; t < T; t++, grad += stride, to += Np) {
        copy_padded(grad, N, Np, to);
        for (int64_t n = 0; n < Np; n += W) {
            const ivec steps = load(active_steps + n);
            store(active_steps + n, load(to + n) != 0.0f ? ivec{} + (t + 1) : steps);
        }
    }
}

// An output layer with intralayer connections (ILC-SAN): A populations of P neurons, N = A P. A neuron q receives
// bias[q] at every spike step, and weight[p, q] at the step after a spike of neuron p of its population.
struct Connections {
    int64_t A, P;
    const float *weight, *bias;  // (A, P, P), (N)

    // to (N) = bias plus the weights from the neurons that fired in `spikes` (N); with null the bias alone.
    void bring(const float* spikes, float* to) const {
        std::memcpy(to, bias, A * P * sizeof(float));
        for (int64_t n = 0; spikes && n < A * P; n++)
            if (spikes[n] > 0.5f)
                for (int64_t q = 0; q < P; q++) to[n / P * P + q] += weight[n * P + q];
    }

    // Adds what a step's drive gradients (N) contribute to the gradients of the previous step's spikes (N).
    void back(const float* grad, float* grad_spikes) const {
        for (int64_t n = 0; n < A * P; n++) {
            float sum = 0.0f;
            for (int64_t q = 0; q < P; q++) sum += weight[n * P + q] * grad[n / P * P + q];
            grad_spikes[n] += sum;
        }
    }
};

}  // namespace

extern "C" {

// Bytes of what spikerl_drive saves and spikerl_drive_back reads for B samples.
int64_t spikerl_drive_saved_bytes(const Net* net, int64_t B) {
    return Activations(net, B, false, true, nullptr).memory.used;
}

// The drive (T, B, N) of a net's only layer by its input spikes: those of the encoder for observations (B, O), which
// with `uniform` (T, B, K) is a Poisson coder; or, if `obs` is null, `spikes` (T, B, K), each 0 or 1.
void spikerl_drive(const Net* net, int64_t B, const float* obs, const float* uniform, const float* spikes, float* drive,
                   char* saved, int threads) {
    const Layers layers(*net, B > MAX_UNPACKED);
    const Layer& l = layers.of[0];
    const Activations acts(net, B, false, true, saved);
    const int T = net->spike_steps;
    const int64_t blocks = (B + SAMPLE_BLOCK - 1) / SAMPLE_BLOCK;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (blocks > 1)
    for (int64_t block = 0; block < blocks; block++) {
        const int64_t from = block * SAMPLE_BLOCK, to = std::min(B, from + SAMPLE_BLOCK);
        for (int64_t b = from; b < to; b++)
            if (obs) encode(acts, b, obs + b * net->obs_dim, uniform ? uniform + b * l.K : nullptr, B * l.K);
            else pack_words(spikes + b * l.K, B * l.K, l.K, T, acts.words[0] + b * padded(l.K));
        list_inputs(acts, 0, l.K, from, to);
        for_each_columns(l, [&](auto V, int64_t n, const auto& columns) {
            const int64_t count = std::min<int64_t>(V * W, l.N - n);
            for (int64_t b = from; b < to; b++) {
                float own[MAX_STEPS * V * W];
                add_inputs<V>(acts, 0, b, columns, l.bias + n, own);
                for (int64_t t = 0; t < T; t++)
                    std::memcpy(drive + (t * B + b) * l.N + n, own + t * V * W, count * sizeof(float));
            }
        });
    }
}

// Gradients from those of the drive, (T, B, N). `grads`: of the encoder's means and standard deviations, unless `obs`
// is null, then of the weights and biases. `grad_spikes` (T, B, K): of the input spikes, if `obs` is null.
void spikerl_drive_back(const Net* net, int64_t B, const float* obs, int poisson, const float* grad, char* saved,
                        float* const* grads, float* grad_spikes, int threads) {
    const Activations acts(net, B, false, true, saved);
    const Layer l(*net, 0);
    const int T = net->spike_steps;
    const int64_t Kp = padded(l.K);
    Scratch memory;
    float *by_drive = memory.array<float>(B * T * l.Np), *by_activity = memory.array<float>(obs ? B * Kp : 0);
    int32_t* active_steps = memory.array<int32_t>(B * l.Np);
    for (int64_t b = 0; b < B; b++)
        take_gradients(grad + b * l.N, B * l.N, l.N, T, by_drive + b * T * l.Np, active_steps + b * l.Np);
    float* const* own = obs ? grads + 2 : grads;
    weight_gradients(acts, 0, l, by_drive, own[0], own[1], threads);
    const EncoderWeights weights(*net, poisson);
    input_gradients(l, B, T, by_drive, active_steps, l.Np, obs ? weights.of : nullptr, threads,
                    [&](int64_t b, const float* by_input) {
                        if (obs) std::memcpy(by_activity + b * Kp, by_input, Kp * sizeof(float));
                        else
                            for (int64_t t = 0; t < T; t++)
                                std::memcpy(grad_spikes + (t * B + b) * l.K, by_input + t * Kp, l.K * sizeof(float));
                    });
    if (obs) field_gradients(acts, obs, by_activity, grads[0], grads[1]);
}

// One layer of M neurons (a multiple of 16) over T spike steps, from its drive (T, M): spikes and voltages (T, M).
void spikerl_scan(const Neurons* neurons, int steps, int64_t M, const float* drive, float* spikes, float* voltage,
                  int threads) {
#pragma omp parallel for num_threads(threads) if (M > 4096)
    for (int64_t m = 0; m < M; m += W) {
        const ivec word = scan(*neurons, steps, drive + m, M, voltage + m, M);
        for (int t = 0; t < steps; t++) store(spikes + t * M + m, (word >> t & 1) != 0 ? broadcast(1.0f) : vec{});
    }
}

// Gradients of the drive (T, M) from those of the spikes. Returns the gradient of voltage_decay if that is learned.
float spikerl_scan_back(const Neurons* neurons, int steps, int64_t M, const float* grad, const float* voltage,
                        float* out, int threads) {
    Scratch memory;
    float* by_decay = memory.array<float>(M / 16);
#pragma omp parallel for num_threads(threads) if (M > 4096)
    for (int64_t m = 0; m < M; m += 16)
        by_decay[m / 16] = scan_back(*neurons, steps, 16, M, grad + m, M, voltage + m, out + m, nullptr);
    double sum = 0.0;
    for (int64_t i = 0; i < M / 16; i++) sum += by_decay[i];
    return float(sum);
}

// As spikerl_scan, for connected neurons of B samples: drive, spikes (T, B, N); voltage (B, T, Np).
void spikerl_connected_scan(const Neurons* neurons, int steps, int64_t B, int64_t A, int64_t P, const float* weight,
                            const float* bias, const float* drive, float* spikes, float* voltage) {
    const Connections connections{A, P, weight, bias};
    const int64_t N = A * P, Np = padded(N);
    Scratch memory;
    float *x = memory.array<float>(Np), *brought = memory.array<float>(Np), *fired = memory.array<float>(Np);
    std::memset(brought, 0, Np * sizeof(float));
    with_neuron(*neurons, [&](auto rest) {
        std::vector<decltype(rest)> states(Np / W, rest);
        for (int64_t b = 0; b < B; b++) {
            std::fill(states.begin(), states.end(), rest);
            for (int64_t t = 0; t < steps; t++) {
                connections.bring(t ? fired : nullptr, brought);
                copy_padded(drive + (t * B + b) * N, N, Np, x);
                float* v = voltage + (b * steps + t) * Np;
                for (int64_t n = 0; n < Np; n += W) {
                    auto& state = states[n / W];
                    state.step(*neurons, load(x + n) + load(brought + n));
                    state.fired = state.v > state.threshold;
                    store(v + n, state.v);
                    store(fired + n, state.fired ? broadcast(1.0f) : vec{});
                }
                std::memcpy(spikes + (t * B + b) * N, fired, N * sizeof(float));
            }
        }
    });
}

// Backward pass of spikerl_connected_scan: the gradients of the drive, `out` (T, B, N), of weight and of bias. Returns
// the gradient of voltage_decay if that is learned.
float spikerl_connected_scan_back(const Neurons* neurons, int steps, int64_t B, int64_t A, int64_t P,
                                  const float* weight, const float* grad, const float* spikes, const float* voltage,
                                  float* out, float* grad_weight, float* grad_bias) {
    const Connections connections{A, P, weight, nullptr};
    const int64_t N = A * P, Np = padded(N);
    Scratch memory;
    float *g = memory.array<float>(Np), *gx = memory.array<float>(Np);
    std::memset(grad_weight, 0, N * P * sizeof(float));
    std::memset(grad_bias, 0, N * sizeof(float));
    double decay = 0.0;
    with_neuron(*neurons, [&](auto neuron) {
        using Back = typename decltype(neuron)::Back;
        with_surrogate(*neurons, [&](auto surrogate) {
            std::vector<Back> backs;
            for (int64_t b = 0; b < B; b++) {
                const float* own = voltage + b * steps * Np;
                backs.clear();
                for (int64_t n = 0; n < Np; n += W) backs.emplace_back(*neurons, steps, own + n, Np);
                for (int t = steps - 1; t >= 0; t--) {
                    const int64_t row = (t * B + b) * N;
                    copy_padded(grad + row, N, Np, g);
                    if (t < steps - 1) connections.back(gx, g);
                    for (int64_t n = 0; n < Np; n += W) {
                        ivec passes;
                        const vec v = load(own + t * Np + n);
                        store(gx + n, backs[n / W].step(*neurons, t, v, load(g + n), surrogate, passes));
                    }
                    std::memcpy(out + row, gx, N * sizeof(float));
                    for (int64_t n = 0; n < N; n++) grad_bias[n] += gx[n];
                    const float* before = t ? spikes + row - B * N : nullptr;
                    for (int64_t n = 0; before && n < N; n++)
                        if (before[n] > 0.5f)
                            for (int64_t q = 0; q < P; q++) grad_weight[n * P + q] += gx[n / P * P + q];
                }
                if constexpr (decltype(neuron)::learns)
                    for (const Back& back : backs)
                        for (int i = 0; i < W; i++) decay += back.decay[i];
            }
        });
    });
    return float(decay);
}
}
