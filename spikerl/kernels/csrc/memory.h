// A bump allocator: arrays follow each other, each from the start of a cache line. None is zeroed.

#pragma once
#include <cstdint>
#include <memory>
#include <vector>

namespace {

struct alignas(64) CacheLine {
    char bytes[64];
};

constexpr int64_t cache_lines(int64_t bytes) {
    return (bytes + int64_t(sizeof(CacheLine)) - 1) / int64_t(sizeof(CacheLine));
}

// Arrays within a block that its caller owns. Without a block all are null, and `used` counts the bytes that it needs.
struct Arena {
    char* block;
    int64_t size, used = 0;

    explicit Arena(char* block_ = nullptr, int64_t size_ = INT64_MAX) : block(block_), size(block_ ? size_ : 0) {}

    // Null if the block is too small.
    template <class X>
    X* array(int64_t count) {
        const int64_t offset = used;
        used += cache_lines(count * int64_t(sizeof(X))) * int64_t(sizeof(CacheLine));
        return used <= size ? reinterpret_cast<X*>(block + offset) : nullptr;
    }
};

// Arrays of the calling thread, which live as long as the Scratch that made them. The thread keeps one block for all of
// them. An array that does not fit has memory of its own; once the block is empty, it grows to the most that was used
// at once, so that repeated calls allocate nothing.
class Scratch {
    struct Stack {
        std::unique_ptr<CacheLine[]> block;
        Arena arena;
        int64_t most = 0;  // bytes used at once
    };
    static Stack& of_thread() {
        thread_local Stack stack;
        return stack;
    }

    Stack& stack = of_thread();
    const int64_t before = stack.arena.used;
    std::vector<std::unique_ptr<CacheLine[]>> others;

  public:
    Scratch() {
        if (before > 0 || stack.most <= stack.arena.size) return;
        stack.block.reset();  // first, so that the old block and the new one do not exist at once
        stack.block.reset(new CacheLine[cache_lines(stack.most)]);
        stack.arena = Arena(stack.block[0].bytes, stack.most);
    }
    ~Scratch() { stack.arena.used = before; }
    Scratch(const Scratch&) = delete;

    template <class X>
    X* array(int64_t count) {
        X* place = stack.arena.array<X>(count);
        if (stack.arena.used > stack.most) stack.most = stack.arena.used;
        if (place) return place;
        others.emplace_back(new CacheLine[cache_lines(count * int64_t(sizeof(X)))]);
        return reinterpret_cast<X*>(others.back().get());
    }
};

}  // namespace
