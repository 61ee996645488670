// Dense products of ReLU networks on AMX, with P planes for every number.

#pragma once
#include <type_traits>

#include "critics.h"

#if HAS_TILES
namespace {
namespace on_tiles {

constexpr int64_t ROW_MULTIPLE = SIDE;  // threads share rows in multiples of this

// The operands of a product (M, D) times (D, N).
template <int P>
struct Operands {
    Scratch memory;
    Operand<P> left, right;
    Operands(int64_t M, int64_t D, int64_t N)
        : left(Operand<P>::allocate(memory, tiles_of(M), blocks_of(D))),
          right(Operand<P>::allocate(memory, tiles_of(N), blocks_of(D))) {}
};

// Calls `f` with the networks' number of planes as a compile-time constant.
template <class F>
void with_planes(const Network& net, F f) {
    if (net.critic->planes == 1) f(std::integral_constant<int, 1>{});
    else f(std::integral_constant<int, PLANES>{});
}

// Rows `from` to `to` of all hidden layers and of the values.
void forward(const Network& net, int64_t from, int64_t to) {
    if (from == to) return;
    const int64_t rows = to - from;
    const TileRegisters registers;
    for (int64_t l = 0; l < net.last(); l++) {
        const Layer layer = net.layer(l);
        const int64_t stride = net.input_stride(l), Np = layer.Np;
        float* out = net.hidden[l] + from * Np;
        Scratch memory;
        float* bias = memory.array<float>(Np);
        copy_padded(layer.bias, layer.N, Np, bias);
        with_planes(net, [&](auto P) {
            const Operands<P> x(rows, layer.I, Np);
            pack_left(ROWS, net.input(l) + from * stride, stride, rows, layer.I, x.left);
            pack_right(COLUMNS, layer.weight, layer.N, layer.I, layer.N, x.right);
            for (int64_t n = 0; n < layer.N; n += SIDE)
                multiply(x.left, tiles_of(rows), x.right, n / SIDE, {bias + n, 0, 0, out + n, SIDE * Np, Np});
        });
        for (int64_t i = 0; i < rows * Np; i += W) store(out + i, relu(load(out + i)));
    }
    last_forward(net, from, to);
}

// Rows `from` to `to` of the gradients before the last ReLU, `out` (to - from, Ip).
void last_backward(const Network& net, int64_t from, int64_t to, float* out) {
    const Layer layer = net.layer(net.last());
    const int64_t Ip = whole_panels(layer.I), M = layer.N;
    Scratch memory;
    const float* weight = transpose_last_weights(layer, memory);
    for (int64_t b = from; b < to; b++, out += Ip)
        for (int64_t i = 0; i < Ip; i += W) {
            vec sum = {};
            for (int64_t m = 0; m < M; m++) sum += load(weight + m * Ip + i) * net.grad[b * M + m];
            store(out + i, load(net.hidden.back() + b * Ip + i) > 0.0f ? sum : vec{});
        }
}

// Rows `from` to `to` of the gradients before all ReLUs, from those of the values.
void backward(const Network& net, int64_t from, int64_t to) {
    if (from == to) return;
    const int64_t rows = to - from;
    const TileRegisters registers;
    for (int64_t l = net.last(); l > 0; l--) {
        const Layer layer = net.layer(l);
        const int64_t Ip = net.input_stride(l);
        const float* units = net.hidden[l - 1] + from * Ip;
        float* below = net.grad_hidden[l - 1] + from * Ip;
        if (l == net.last()) {
            last_backward(net, from, to, below);
            continue;
        }
        with_planes(net, [&](auto P) {
            const Operands<P> x(rows, layer.N, layer.I);
            pack_left(ROWS, net.grad_hidden[l] + from * layer.Np, layer.Np, rows, layer.N, x.left);
            pack_right(ROWS, layer.weight, layer.N, layer.N, layer.I, x.right);
            for (int64_t i = 0; i < layer.I; i += SIDE)
                multiply(x.left, tiles_of(rows), x.right, i / SIDE, {ZEROS, 0, 0, below + i, SIDE * Ip, Ip});
        });
        for (int64_t i = 0; i < rows * Ip; i += W)
            store(below + i, load(units + i) > 0.0f ? load(below + i) : vec{});
    }
}

// Gradients of a hidden layer's weights and biases, for outputs `from` to `to`, `from` being a multiple of W.
void weight_gradients(const Network& net, int64_t l, int64_t from, int64_t to, float* grad_weight, float* grad_bias) {
    const Layer layer = net.layer(l);
    const float* grads = net.grad_hidden[l] + from;
    const int64_t tiles = tiles_of(layer.I), outputs = to - from;
    Scratch memory;
    float* column = memory.array<float>(tiles * SIDE * SIDE);
    const TileRegisters registers;
    with_planes(net, [&](auto P) {
        const Operands<P> x(layer.I, net.B, outputs);
        pack_left(COLUMNS, net.input(l), net.input_stride(l), layer.I, net.B, x.left);
        pack_right(COLUMNS, grads, layer.Np, net.B, outputs, x.right);
        for (int64_t n = 0; n < outputs; n += SIDE) {
            multiply(x.left, tiles, x.right, n / SIDE, {ZEROS, 0, 0, column, SIDE * SIDE, SIDE});
            for (int64_t i = 0; i < layer.I; i++)
                _mm512_mask_storeu_ps(grad_weight + i * layer.N + from + n, lane_mask(outputs - n),
                                      _mm512_load_ps(column + i * SIDE));
        }
    });
    float* bias = memory.array<float>(padded(outputs));
    std::memset(bias, 0, padded(outputs) * sizeof(float));
    for (int64_t b = 0; b < net.B; b++)
        for (int64_t n = 0; n < outputs; n += W) store(bias + n, load(bias + n) + load(grads + b * layer.Np + n));
    std::memcpy(grad_bias + from, bias, outputs * sizeof(float));
}

// grad_act (B, A) += this network's gradient of the actions.
void add_action_gradients(const Network& net, float* grad_act) {
    const Layer layer = net.layer(0);
    const int64_t O = net.critic->obs_dim, A = net.critic->act_dim, B = net.B, tiles = tiles_of(B);
    Scratch memory;
    float* column = memory.array<float>(tiles * SIDE * SIDE);
    const TileRegisters registers;
    with_planes(net, [&](auto P) {
        const Operands<P> x(B, layer.N, A);
        pack_left(ROWS, net.grad_hidden[0], layer.Np, B, layer.N, x.left);
        pack_right(ROWS, layer.weight + O * layer.N, layer.N, layer.N, A, x.right);
        for (int64_t a = 0; a < A; a += SIDE) {
            multiply(x.left, tiles, x.right, a / SIDE, {ZEROS, 0, 0, column, SIDE * SIDE, SIDE});
            for (int64_t b = 0; b < B; b++)
                for (int64_t k = 0; k < SIDE && a + k < A; k++) grad_act[b * A + a + k] += column[b * SIDE + k];
        }
    });
}

}  // namespace on_tiles
}  // namespace
#endif
