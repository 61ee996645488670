// Entry points for dense ReLU networks: values and actions, TD targets, and gradients.

#include "critics_lists.h"
#include "critics_tiles.h"

namespace {

// The two ways to form products, as types that `dispatch` chooses from.
struct ByLists {
    static constexpr bool lists = true;
    static constexpr int64_t row_multiple = by_lists::ROW_MULTIPLE;
    static constexpr auto forward = by_lists::forward;
    static constexpr auto backward = by_lists::backward;
    static constexpr auto weight_gradients = by_lists::weight_gradients;
    static constexpr auto add_action_gradients = by_lists::add_action_gradients;
};
#if HAS_TILES
struct OnTiles {
    static constexpr bool lists = false;
    static constexpr int64_t row_multiple = on_tiles::ROW_MULTIPLE;
    static constexpr auto forward = on_tiles::forward;
    static constexpr auto backward = on_tiles::backward;
    static constexpr auto weight_gradients = on_tiles::weight_gradients;
    static constexpr auto add_action_gradients = on_tiles::add_action_gradients;
};
#endif

constexpr int64_t MAX_LISTED = 128;  // largest float32 batch for which lists are faster than packing weights for AMX

// Calls `f` with the faster way for a batch of this size. The values have no influence: equal calls give equal bits.
template <class F>
void dispatch([[maybe_unused]] const Critic& critic, [[maybe_unused]] int64_t B, F f) {
#if HAS_TILES
    if (critic.planes == 1 || B > MAX_LISTED) return f(OnTiles{});
#endif
    f(ByLists{});
}

// One thread's share of the work: one network, and `from` to `to` of `size`, in multiples of `multiple`.
struct Job {
    int64_t network, from, to;
    Job(int64_t i, int64_t networks, int64_t size, int64_t multiple, int threads) {
        const int64_t shares = count(networks, threads) / networks, multiples = (size + multiple - 1) / multiple;
        network = i / shares;
        from = multiples * (i % shares) / shares * multiple;
        to = std::min(size, multiples * (i % shares + 1) / shares * multiple);
    }
    static int64_t count(int64_t networks, int threads) { return networks * ((threads + networks - 1) / networks); }
};

// Calls `f(network, from, to)` for all rows of all networks.
template <class F>
void parallel_rows(const std::vector<Network>& nets, int64_t multiple, int threads, F f) {
    const int64_t jobs = Job::count(int64_t(nets.size()), threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < jobs; i++) {
        const Job job(i, int64_t(nets.size()), nets[0].B, multiple, threads);
        f(nets[job.network], job.from, job.to);
    }
}

// Gradients of all weights and biases, from the gradients before the ReLUs and of the outputs. Those of layer l's
// weights go to grads[stride l], those of its biases to grads[stride l + bias].
template <class Way>
void parameter_gradients(Way way, const std::vector<Network>& nets, float* const* grads, int stride, int bias,
                         int threads) {
    const Critic& critic = *nets[0].critic;
    const int64_t jobs = Job::count(int64_t(nets.size()), threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < jobs; i++)
        for (int64_t l = 0; l < critic.layers; l++) {
            const bool last = l == critic.layers - 1;  // its few outputs are work for one thread
            const Job job(i, int64_t(nets.size()), last ? 1 : critic.widths[l + 1], W, threads);
            const Network& net = nets[job.network];
            const Layer layer = net.layer(l);
            float* grad_weight = grads[stride * l] + net.c * layer.I * layer.N;
            float* grad_bias = grads[stride * l + bias] + net.c * layer.N;
            if (job.from == job.to) continue;
            if (last) last_weight_gradients(net, grad_weight, grad_bias);
            else way.weight_gradients(net, l, job.from, job.to, grad_weight, grad_bias);
        }
}

// The lowest of the networks' values of sample b; NaN counts as the lowest, so that it is not hidden.
inline float lowest_value(const std::vector<Network>& nets, int64_t b) {
    float lowest = nets[0].values[b];
    for (const Network& net : nets)
        if (const float value = net.values[b]; value < lowest || value != value) lowest = value;
    return lowest;
}

}  // namespace

extern "C" {

// Values (C, B) of observations (B, O) and actions (B, A).
void spikerl_values(const Critic* critic, int64_t B, const float* obs, const float* act, float* values, int threads) {
    dispatch(*critic, B, [&](auto way) {
        Scratch memory;
        const auto nets = prepare(*critic, B, obs, act, NOTHING, way.lists, memory);
        parallel_rows(nets, way.row_multiple, threads, way.forward);
        for (const Network& net : nets) std::memcpy(values + net.c * B, net.values, B * sizeof(float));
    });
}

// target (B) = rew + discount (lowest value over networks of observations and actions + bonus), without the second term
// where `terminated` is not 0; a null `bonus` is 0.
void spikerl_td_target(const Critic* critic, int64_t B, const float* obs, const float* act, const float* rew,
                       const float* discount, const uint8_t* terminated, float* target, const float* bonus, int threads) {
    dispatch(*critic, B, [&](auto way) {
        Scratch memory;
        const auto nets = prepare(*critic, B, obs, act, NOTHING, way.lists, memory);
        parallel_rows(nets, way.row_multiple, threads, way.forward);
        for (int64_t b = 0; b < B; b++) {
            float value = lowest_value(nets, b);
            if (bonus) value += bonus[b];
            target[b] = terminated[b] ? rew[b] : rew[b] + discount[b] * value;
        }
    });
}

// `loss`: `weight` times the sum over networks of the mean squared error; `grads`: its gradients, of all layers'
// weights and then of all biases; `mean`: the mean of all values.
void spikerl_critic_backward(const Critic* critic, int64_t B, const float* obs, const float* act, const float* target,
                             float weight, float* const* grads, float* loss, float* mean, int threads) {
    dispatch(*critic, B, [&](auto way) {
        Scratch memory;
        const auto nets = prepare(*critic, B, obs, act, PARAMETERS, way.lists, memory);
        parallel_rows(nets, way.row_multiple, threads, [&](const Network& net, int64_t from, int64_t to) {
            way.forward(net, from, to);
            for (int64_t b = from; b < to; b++) net.grad[b] = 2.0f * weight * (net.values[b] - target[b]) / float(B);
            way.backward(net, from, to);
        });
        parameter_gradients(way, nets, grads, 1, critic->layers, threads);
        double squares = 0.0, sum = 0.0;
        for (const Network& net : nets)
            for (int64_t b = 0; b < B; b++) {
                const double error = double(net.values[b]) - double(target[b]);
                squares += error * error, sum += net.values[b];
            }
        *loss = float(squares * weight / double(B));
        *mean = float(sum / double(B * critic->networks));
    });
}

// Returns the mean over samples of the lowest value over networks; grad_act (B, A): `weight` times its gradient with
// respect to the actions.
float spikerl_actor_loss_grad(const Critic* critic, int64_t B, const float* obs, const float* act, float weight,
                    float* grad_act, int threads) {
    double sum = 0.0;
    dispatch(*critic, B, [&](auto way) {
        Scratch memory;
        const auto nets = prepare(*critic, B, obs, act, INPUTS, way.lists, memory);
        parallel_rows(nets, way.row_multiple, threads, way.forward);
        for (int64_t b = 0; b < B; b++) {
            const float lowest = lowest_value(nets, b);
            int equal = 0;  // networks with the lowest value, which share the gradient
            for (const Network& net : nets) equal += net.values[b] == lowest;
            const float share = equal ? weight / (float(B) * float(equal)) : lowest;  // NaN equals none
            for (const Network& net : nets) net.grad[b] = net.values[b] == lowest || !equal ? share : 0.0f;
            sum += lowest;
        }
        parallel_rows(nets, way.row_multiple, threads, way.backward);
        std::memset(grad_act, 0, B * critic->act_dim * sizeof(float));
        for (const Network& net : nets) way.add_action_gradients(net, grad_act);
    });
    return float(sum / double(B));
}

// Bytes of what spikerl_dense_forward saves and spikerl_dense_backward reads for B samples.
int64_t spikerl_dense_saved_bytes(const Critic* critic, int64_t B) {
    Arena saved;
    for (int64_t l = 0; l < critic->layers - 1; l++) saved.array<float>(hidden_size(*critic, l, B));
    return saved.used;
}

// Outputs (B, M) of one network for observations (B, O), or with `squash` their tanh. `saved` is null if no backward
// pass follows.
void spikerl_dense_forward(const Critic* critic, int64_t B, const float* obs, float* act, char* saved, bool squash,
                           int threads) {
    dispatch(*critic, B, [&](auto way) {
        Scratch memory;
        const auto nets = prepare(*critic, B, obs, nullptr, NOTHING, way.lists, memory, saved);
        parallel_rows(nets, way.row_multiple, threads, way.forward);
        const float* values = nets[0].values;
        for (int64_t i = 0; i < B * nets[0].outputs(); i++) act[i] = squash ? std::tanh(values[i]) : values[i];
    });
}

// `grads`: the gradients of each layer's weights and biases, from `grad` (B, M), the gradient of the outputs of
// spikerl_dense_forward. `act` (B, M): these outputs if they were squashed, else null.
void spikerl_dense_backward(const Critic* critic, int64_t B, const float* obs, const float* act, const float* grad,
                            char* saved, float* const* grads, int threads) {
    dispatch(*critic, B, [&](auto way) {
        Scratch memory;
        const auto nets = prepare(*critic, B, obs, nullptr, PARAMETERS, way.lists, memory, saved);
        for (int64_t i = 0; i < B * nets[0].outputs(); i++)
            nets[0].grad[i] = act ? grad[i] * (1.0f - act[i] * act[i]) : grad[i];
        parallel_rows(nets, way.row_multiple, threads, way.backward);
        parameter_gradients(way, nets, grads, 2, 1, threads);
    });
}

// `loss`: `weight` times the mean squared error of the squashed outputs from `goal` (B, M); `grads`: its gradients, of
// each layer's weights and biases.
void spikerl_mse_backward(const Critic* critic, int64_t B, const float* obs, const float* goal, float weight,
                          float* const* grads, float* loss, int threads) {
    dispatch(*critic, B, [&](auto way) {
        Scratch memory;
        const auto nets = prepare(*critic, B, obs, nullptr, PARAMETERS, way.lists, memory);
        const int64_t M = nets[0].outputs();
        parallel_rows(nets, way.row_multiple, threads, [&](const Network& net, int64_t from, int64_t to) {
            way.forward(net, from, to);
            for (int64_t i = from * M; i < to * M; i++) {
                const float act = net.values[i] = std::tanh(net.values[i]);
                net.grad[i] = 2.0f * weight * (act - goal[i]) * (1.0f - act * act) / float(B * M);
            }
            way.backward(net, from, to);
        });
        parameter_gradients(way, nets, grads, 2, 1, threads);
        double squares = 0.0;
        for (int64_t i = 0; i < B * M; i++) {
            const double error = double(nets[0].values[i]) - double(goal[i]);
            squares += error * error;
        }
        *loss = float(squares * weight / double(B * M));
    });
}
}
