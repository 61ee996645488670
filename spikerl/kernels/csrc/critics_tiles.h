// Products of ReLU networks on matrix units, dense: P planes of every number.

#pragma once
#include "critics.h"

#if HAS_TILES
namespace {
namespace on_tiles {

constexpr int64_t SHARE = SIDE;  // threads take multiples of so many rows

// Memory of the calling thread for a product's operands.
template <int P>
struct Pair {
    Operand<P> left, right;
    Pair(int64_t M, int64_t D, int64_t N) {
        const int64_t blocks = blocks_of(D), bytes = Operand<P>::bytes(tiles_of(M), blocks);
        char* memory = scratch<21>(bytes + Operand<P>::bytes(tiles_of(N), blocks));
        left = {reinterpret_cast<bf16*>(memory), blocks};
        right = {reinterpret_cast<bf16*>(memory + bytes), blocks};
    }
};

// Calls `use` with the networks' number of planes as a constant.
template <class F>
void with_planes(const Network& net, F use) {
    if (net.critic->planes == 1) use(std::integral_constant<int, 1>{});
    else use(std::integral_constant<int, PLANES>{});
}

// Rows `from` to `to` of all hidden layers and of the values.
void forward(const Network& net, int64_t from, int64_t to) {
    if (from == to) return;
    const int64_t rows = to - from;
    const Tiles registers;
    for (int64_t l = 0; l < net.last(); l++) {
        const Layer layer = net.layer(l);
        const int64_t step = l ? net.layer(l - 1).Np : layer.I, Np = layer.Np;
        const float* input = (l ? net.hidden[l - 1] : net.x) + from * step;
        float* out = net.hidden[l] + from * Np;
        float* bias = reinterpret_cast<float*>(scratch<22>(Np * sizeof(float)));
        std::memset(bias, 0, Np * sizeof(float));
        std::memcpy(bias, layer.bias, layer.N * sizeof(float));
        with_planes(net, [&](auto P) {
            const Pair<P> pair(rows, layer.I, Np);
            pack_left(ROWS, input, step, rows, layer.I, pair.left);
            pack_right(COLUMNS, layer.weight, layer.N, layer.I, layer.N, pair.right);
            for (int64_t n = 0; n < layer.N; n += SIDE)
                product(pair.left, tiles_of(rows), pair.right, n / SIDE, {bias + n, 0, 0, out + n, SIDE * Np, Np});
        });
        for (int64_t i = 0; i < rows * Np; i += W) {
            const vec v = load(out + i);
            store(out + i, v <= 0.0f ? vec{} : v);  // NaN stays
        }
    }
    last_values(net, from, to);
}

// Those of the last hidden layer's drives, `out` (to - from, Ip).
void last_drives(const Network& net, int64_t from, int64_t to, float* out) {
    const Layer layer = net.layer(net.last());
    const int64_t Ip = whole_panels(layer.I), M = layer.N;
    float* weight = by_output(layer);
    for (int64_t b = from; b < to; b++, out += Ip)
        for (int64_t i = 0; i < Ip; i += W) {
            vec sum = {};
            for (int64_t m = 0; m < M; m++) sum += load(weight + m * Ip + i) * net.grad[b * M + m];
            store(out + i, load(net.hidden.back() + b * Ip + i) > 0.0f ? sum : vec{});
        }
}

// Rows `from` to `to` of the gradients of all hidden layers' drives, from those of the values.
void backward(const Network& net, int64_t from, int64_t to) {
    if (from == to) return;
    const int64_t rows = to - from;
    const Tiles registers;
    for (int64_t l = net.last(); l > 0; l--) {
        const Layer layer = net.layer(l);
        const int64_t Ip = net.layer(l - 1).Np, first = from * Ip;
        const float* units = net.hidden[l - 1] + first;
        float* below = net.drives[l - 1] + first;
        if (l == net.last()) {
            last_drives(net, from, to, below);
            continue;
        }
        with_planes(net, [&](auto P) {
            const Pair<P> pair(rows, layer.N, layer.I);
            pack_left(ROWS, net.drives[l] + from * layer.Np, layer.Np, rows, layer.N, pair.left);
            pack_right(ROWS, layer.weight, layer.N, layer.N, layer.I, pair.right);
            for (int64_t i = 0; i < layer.I; i += SIDE)
                product(pair.left, tiles_of(rows), pair.right, i / SIDE, {ZEROS, 0, 0, below + i, SIDE * Ip, Ip});
        });
        for (int64_t i = 0; i < rows * Ip; i += W)
            store(below + i, load(units + i) > 0.0f ? load(below + i) : vec{});
    }
}

// Gradients of a hidden layer's weights and biases, for outputs `from` to `to`, `from` being a multiple of W.
void weight_gradients(const Network& net, int64_t l, int64_t from, int64_t to, float* grad_weight, float* grad_bias) {
    const Layer layer = net.layer(l);
    const float* drives = net.drives[l] + from;
    const int64_t step = l ? net.layer(l - 1).Np : layer.I, tiles = tiles_of(layer.I);
    float* block = reinterpret_cast<float*>(scratch<22>(tiles * SIDE * SIDE * sizeof(float)));
    const Tiles registers;
    with_planes(net, [&](auto P) {
        const Pair<P> pair(layer.I, net.B, to - from);
        pack_left(COLUMNS, l ? net.hidden[l - 1] : net.x, step, layer.I, net.B, pair.left);
        pack_right(COLUMNS, drives, layer.Np, net.B, to - from, pair.right);
        for (int64_t n = 0; n < to - from; n += SIDE) {
            product(pair.left, tiles, pair.right, n / SIDE, {ZEROS, 0, 0, block, SIDE * SIDE, SIDE});
            const __mmask16 there = first_lanes(to - from - n);
            for (int64_t i = 0; i < layer.I; i++)
                _mm512_mask_storeu_ps(grad_weight + i * layer.N + from + n, there, _mm512_load_ps(block + i * SIDE));
        }
    });
    float* bias = reinterpret_cast<float*>(scratch<22>(padded(to - from) * sizeof(float)));
    std::memset(bias, 0, padded(to - from) * sizeof(float));
    for (int64_t b = 0; b < net.B; b++)
        for (int64_t n = 0; n < to - from; n += W) store(bias + n, load(bias + n) + load(drives + b * layer.Np + n));
    std::memcpy(grad_bias + from, bias, (to - from) * sizeof(float));
}

// grad_act (B, A) += the gradient of the networks' inputs, at the actions.
void add_action_gradients(const Network& net, float* grad_act) {
    const Layer layer = net.layer(0);
    const int64_t O = net.critic->obs_dim, A = net.critic->act_dim, B = net.B, tiles = tiles_of(B);
    float* block = reinterpret_cast<float*>(scratch<22>(tiles * SIDE * SIDE * sizeof(float)));
    const Tiles registers;
    with_planes(net, [&](auto P) {
        const Pair<P> pair(B, layer.N, A);
        pack_left(ROWS, net.drives[0], layer.Np, B, layer.N, pair.left);
        pack_right(ROWS, layer.weight + O * layer.N, layer.N, layer.N, A, pair.right);
        for (int64_t a = 0; a < A; a += SIDE) {
            product(pair.left, tiles, pair.right, a / SIDE, {ZEROS, 0, 0, block, SIDE * SIDE, SIDE});
            for (int64_t b = 0; b < B; b++)
                for (int64_t k = 0; k < SIDE && a + k < A; k++) grad_act[b * A + a + k] += block[b * SIDE + k];
        }
    });
}

}  // namespace on_tiles
}  // namespace
#endif
