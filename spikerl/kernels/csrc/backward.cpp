// Backward: gradients of all parameters from those of the actions.

#include "backward.h"
#include "backward_events.h"
#include "backward_tiles.h"
#include "encoder.h"

namespace {

// Computes the gradients of all layers' weights from those of the actions; returns the gradients of the encoder's
// activities, (B, K0p), which are sums over steps t of the spikes' gradients with weights encoder_weight[t].
const float* backward_events(const Activations& acts, const float* encoder_weight, const ActionGradients& actions,
                             const Gradients& out, Scratch& memory, int threads) {
    const Net& net = *acts.net;
    const int64_t B = acts.samples, T = net.spike_steps;
    const int64_t widest = widest_layer(net);
    // Gradients of the drives of two consecutive layers.
    float *above = memory.array<float>(B * T * widest), *below = memory.array<float>(B * T * widest);
    int32_t* active_steps = memory.array<int32_t>(B * widest);
    float* by_decay = memory.array<float>(B);  // each sample's gradient of a layer's voltage_decay
    const int64_t Np = padded(net.widths[net.layers]);
    const int last = net.layers - 1;
    actions.decoder_backward(acts, out, [&](int64_t b, const float* grad_spikes) {
        by_decay[b] = scan_back(acts.neurons[last], int(T), Np, Np, grad_spikes, 0, acts.voltage[last] + b * T * Np,
                                above + b * T * Np, active_steps + b * widest);
    });
    for (int layer = last; layer >= 0; layer--) {
        out.put_decay(acts, layer, by_decay);
        const Layer l(net, layer);
        weight_gradients(acts, layer, l, above, out.weight(layer), out.bias(layer), threads);
        const float* step_weight = layer == 0 ? encoder_weight : nullptr;
        input_gradients(l, B, T, above, active_steps, widest, step_weight, threads, [&](int64_t b, float* grad) {
            const int64_t Kp = padded(l.K);
            if (layer == 0) {
                std::memcpy(below + b * Kp, grad, Kp * sizeof(float));
                return;
            }
            actions.add_cost(layer - 1, grad, T, Kp, l.K);
            by_decay[b] = scan_back(acts.neurons[layer - 1], int(T), Kp, Kp, grad, Kp,
                                    acts.voltage[layer - 1] + b * T * Kp, below + b * T * Kp,
                                    active_steps + b * widest);
        });
        std::swap(above, below);
    }
    return above;
}

void backward(const Net& net, int64_t B, const float* obs, bool poisson, const ActionGradients& actions, char* saved,
              const Gradients& out, int threads) {
    const Activations acts(&net, B, true, uses_events(net, B), saved);
    const EncoderWeights weights(net, poisson);
    Scratch memory;
#if HAS_TILES
    const float* grad_activity = uses_events(net, B)
                                     ? backward_events(acts, weights.of, actions, out, memory, threads)
                                     : backward_tiles(acts, weights.of, actions, out, memory, threads);
#else
    const float* grad_activity = backward_events(acts, weights.of, actions, out, memory, threads);
#endif
    field_gradients(acts, obs, grad_activity, out.mean, out.std);
}

}  // namespace

extern "C" {

// Writes the gradients of all parameters to `grads`: the encoder's means and standard deviations, each layer's weights
// and biases, each layer's decay if it is learned, the decoder's weights and biases. `saved` is as spikerl_forward left
// it. `act` is null if that did not squash. `by_spike` (layers), the gradient of the spike cost with respect to one
// spike of each layer, is null if spikes cost nothing.
void spikerl_backward(const Net* net, int64_t B, const float* obs, int poisson, const float* act, const float* grad_act,
                      const float* by_spike, char* saved, float* const* grads, int threads) {
    backward(*net, B, obs, poisson, {act, grad_act, by_spike}, saved, Gradients(*net, grads), threads);
}

// Spikes of each layer over all samples and steps, from `saved` as spikerl_forward left it.
void spikerl_count_spikes(const Net* net, int64_t B, char* saved, int64_t* counts) {
    const Activations acts(net, B, true, uses_events(*net, B), saved);
    for (int layer = 1; layer <= net->layers; layer++) {
        const int64_t N = net->widths[layer], Np = padded(N);
        int64_t count = 0;
        for (int64_t b = 0; b < B; b++)
            for (int64_t n = 0; n < N; n++) count += __builtin_popcount(acts.words[layer][b * Np + n]);
        counts[layer - 1] = count;
    }
}
}
