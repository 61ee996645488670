// What the library offers of ReLU networks: values, and the gradients of a regression and of an ascent.

#include "critics_lists.h"
#include "critics_tiles.h"

namespace {

// Who forms the products.
struct ByLists {
    static constexpr bool lists = true;
    static constexpr int64_t share = by_lists::SHARE;
    static constexpr auto forward = by_lists::forward;
    static constexpr auto backward = by_lists::backward;
    static constexpr auto weight_gradients = by_lists::weight_gradients;
    static constexpr auto add_action_gradients = by_lists::add_action_gradients;
};
#if HAS_TILES
struct OnTiles {
    static constexpr bool lists = false;
    static constexpr int64_t share = on_tiles::SHARE;
    static constexpr auto forward = on_tiles::forward;
    static constexpr auto backward = on_tiles::backward;
    static constexpr auto weight_gradients = on_tiles::weight_gradients;
    static constexpr auto add_action_gradients = on_tiles::add_action_gradients;
};
#endif

constexpr int64_t LISTED = 128;  // up to so many samples of float32, packing weights costs more than lists do

// `use(way)` with the one that is faster for such products, whatever is in them.
template <class F>
void choose([[maybe_unused]] const Critic& critic, [[maybe_unused]] int64_t B, F use) {
#if HAS_TILES
    if (critic.planes == 1 || B > LISTED) return use(OnTiles{});
#endif
    use(ByLists{});
}

// What a thread takes at once: one network, and a share of something that counts `size`, in multiples of `unit`.
struct Job {
    int64_t network, from, to;
    Job(int64_t i, int64_t networks, int64_t size, int64_t unit, int threads) {
        const int64_t shares = count(networks, threads) / networks, units = (size + unit - 1) / unit;
        network = i / shares;
        from = units * (i % shares) / shares * unit;
        to = units * (i % shares + 1) / shares * unit;
        to = to < size ? to : size;
    }
    static int64_t count(int64_t networks, int threads) { return networks * ((threads + networks - 1) / networks); }
};

template <class F>
void share_rows(const std::vector<Network>& nets, int64_t unit, int threads, F work) {
    const int64_t jobs = Job::count(int64_t(nets.size()), threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < jobs; i++) {
        const Job job(i, int64_t(nets.size()), nets[0].B, unit, threads);
        work(nets[job.network], job.from, job.to);
    }
}

// Gradients of all weights and biases, from those of the drives and of the outputs. Layer l's weights are number
// `step` l of `grads`, its biases `bias` further.
template <class Way>
void parameter_gradients(Way way, const std::vector<Network>& nets, float* const* grads, int step, int bias,
                         int threads) {
    const Critic& critic = *nets[0].critic;
    const int64_t jobs = Job::count(int64_t(nets.size()), threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < jobs; i++)
        for (int64_t l = 0; l < critic.layers; l++) {
            const bool last = l == critic.layers - 1;  // it has few outputs, which one thread takes
            const Job job(i, int64_t(nets.size()), last ? 1 : critic.widths[l + 1], W, threads);
            const Network& net = nets[job.network];
            const Layer layer = net.layer(l);
            float* grad_weight = grads[step * l] + net.c * layer.I * layer.N;
            float* grad_bias = grads[step * l + bias] + net.c * layer.N;
            if (job.from == job.to) continue;
            if (last) last_gradients(net, grad_weight, grad_bias);
            else way.weight_gradients(net, l, job.from, job.to, grad_weight, grad_bias);
        }
}

}  // namespace

extern "C" {

// Values (C, B) of observations (B, O) and actions (B, A).
void spikerl_values(const Critic* critic, int64_t B, const float* obs, const float* act, float* values, int threads) {
    choose(*critic, B, [&](auto way) {
        const auto nets = start(*critic, B, obs, act, NOTHING, way.lists);
        share_rows(nets, way.share, threads, way.forward);
        for (const Network& net : nets) std::memcpy(values + net.c * B, net.values, B * sizeof(float));
    });
}

// target (B): the reward, and the discounted least value of observations and actions where `terminated` is 0.
void spikerl_td_target(const Critic* critic, int64_t B, const float* obs, const float* act, const float* rew,
                     const float* discount, const uint8_t* terminated, float* target, int threads) {
    choose(*critic, B, [&](auto way) {
        const auto nets = start(*critic, B, obs, act, NOTHING, way.lists);
        share_rows(nets, way.share, threads, way.forward);
        for (int64_t b = 0; b < B; b++) {
            float least = nets[0].values[b];
            for (const Network& net : nets) {
                const float value = net.values[b];
                if (value < least || value != value) least = value;  // NaN is the least
            }
            target[b] = terminated[b] ? rew[b] : rew[b] + discount[b] * least;
        }
    });
}

// `weight` times the networks' mean squared errors, summed: `loss`, and its gradients, of all layers' weights and then
// of all biases; the mean of all values.
void spikerl_critic_backward(const Critic* critic, int64_t B, const float* obs, const float* act, const float* target,
                     float weight, float* const* grads, float* loss, float* mean, int threads) {
    choose(*critic, B, [&](auto way) {
        const auto nets = start(*critic, B, obs, act, PARAMETERS, way.lists);
        share_rows(nets, way.share, threads, [&](const Network& net, int64_t from, int64_t to) {
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

// The mean over samples of the least of the networks' values, and `weight` times its gradient by the actions (B, A).
float spikerl_dq_da(const Critic* critic, int64_t B, const float* obs, const float* act, float weight,
                             float* grad_act, int threads) {
    double sum = 0.0;
    choose(*critic, B, [&](auto way) {
        const auto nets = start(*critic, B, obs, act, INPUTS, way.lists);
        share_rows(nets, way.share, threads, way.forward);
        for (int64_t b = 0; b < B; b++) {
            const Network* least = &nets[0];
            for (const Network& net : nets) {
                net.grad[b] = 0.0f;
                if (net.values[b] < least->values[b] || net.values[b] != net.values[b]) least = &net;
            }
            least->grad[b] = weight / float(B);
            sum += least->values[b];
        }
        share_rows(nets, way.share, threads, way.backward);
        std::memset(grad_act, 0, B * critic->act_dim * sizeof(float));
        for (const Network& net : nets) way.add_action_gradients(net, grad_act);
    });
    return float(sum / double(B));
}

// Actions (B, M) of observations (B, O) from one network: tanh of its outputs.
void spikerl_dense_actions(const Critic* critic, int64_t B, const float* obs, float* act, int threads) {
    choose(*critic, B, [&](auto way) {
        const auto nets = start(*critic, B, obs, nullptr, NOTHING, way.lists);
        share_rows(nets, way.share, threads, way.forward);
        for (int64_t i = 0; i < B * nets[0].outputs(); i++) act[i] = std::tanh(nets[0].values[i]);
    });
}

// `weight` times the mean squared error of those actions from `goal` (B, M): `loss`, and its gradients, of each layer's
// weights and biases.
void spikerl_mse_backward(const Critic* critic, int64_t B, const float* obs, const float* goal, float weight,
                     float* const* grads, float* loss, int threads) {
    choose(*critic, B, [&](auto way) {
        const auto nets = start(*critic, B, obs, nullptr, PARAMETERS, way.lists);
        const int64_t M = nets[0].outputs();
        share_rows(nets, way.share, threads, [&](const Network& net, int64_t from, int64_t to) {
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
