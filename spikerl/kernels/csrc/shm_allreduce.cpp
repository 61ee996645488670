// Sums over processes of one machine, in memory that they share: `ranks` lines of 64 bytes, which say how many vectors
// a process has put there, then two slots for each process. A slot is written again only when everybody has put the
// vector after it, and so has read it. Everybody adds in the order of ranks: the sums are the same bits everywhere.

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>
#include <cstdint>
#include <cstring>
#include <ctime>

namespace {

struct alignas(64) Line {
    std::atomic<uint32_t> put;
};

#if defined(__linux__)
void wait_for(std::atomic<uint32_t>* word, uint32_t seen, long nanoseconds) {
    const timespec time{0, nanoseconds};
    syscall(SYS_futex, word, FUTEX_WAIT, seen, &time, nullptr, 0);
}
void wake(std::atomic<uint32_t>* word) { syscall(SYS_futex, word, FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0); }
#else
void wait_for(std::atomic<uint32_t>*, uint32_t, long) {
    const timespec time{0, 20000};
    nanosleep(&time, nullptr);
}
void wake(std::atomic<uint32_t>*) {}
#endif

constexpr int SPINS = 2000;            // some tens of microseconds
constexpr long PATIENCE = 20'000'000;  // ns of one wait in the kernel

char* slot(char* base, int ranks, int64_t bytes, uint32_t round, int rank) {
    return base + ranks * int64_t(sizeof(Line)) + ((round & 1) * ranks + rank) * bytes;
}

template <class X>
void add(char* base, int ranks, int64_t bytes, uint32_t round, int own, char* out) {
    constexpr int64_t PART = 512;  // what stays in registers and the first cache
    X* sums = reinterpret_cast<X*>(out);
    const int64_t n = bytes / int64_t(sizeof(X));
    if (ranks == 2) {  // the order of two does not matter, and `out` is what lies in the own slot
        const X* other = reinterpret_cast<const X*>(slot(base, ranks, bytes, round, 1 - own));
        for (int64_t i = 0; i < n; i++) sums[i] += other[i];
        return;
    }
    for (int64_t first = 0; first < n; first += PART) {
        const int64_t count = n - first < PART ? n - first : PART;
        std::memcpy(sums + first, slot(base, ranks, bytes, round, 0) + first * sizeof(X), count * sizeof(X));
        for (int rank = 1; rank < ranks; rank++) {
            const X* other = reinterpret_cast<const X*>(slot(base, ranks, bytes, round, rank)) + first;
            for (int64_t i = 0; i < count; i++) sums[first + i] += other[i];
        }
    }
}

}  // namespace

extern "C" {

int64_t spikerl_shm_bytes(int ranks, int64_t bytes) { return ranks * (int64_t(sizeof(Line)) + 2 * bytes); }

// Put this process's vector; `round` counts from 0.
void spikerl_shm_write(char* base, int rank, int ranks, int64_t bytes, uint32_t round, const char* vector) {
    std::memcpy(slot(base, ranks, bytes, round, rank), vector, bytes);
    Line* lines = reinterpret_cast<Line*>(base);
    lines[rank].put.store(round + 1, std::memory_order_release);
    wake(&lines[rank].put);
}

// `out`, the vector that this process has put, becomes the sum over all; -1, or else the rank of a process that has not
// put its vector for a while.
int spikerl_shm_sum(char* base, int own, int ranks, int64_t bytes, uint32_t round, char* out, bool is_double) {
    Line* lines = reinterpret_cast<Line*>(base);
    for (int rank = 0; rank < ranks; rank++) {
        std::atomic<uint32_t>& put = lines[rank].put;
        for (int spin = 0; spin < SPINS && int32_t(put.load(std::memory_order_acquire) - round) <= 0; spin++) {
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
        }
        const uint32_t seen = put.load(std::memory_order_acquire);
        if (int32_t(seen - round) > 0) continue;
        wait_for(&put, seen, PATIENCE);
        if (int32_t(put.load(std::memory_order_acquire) - round) <= 0) return rank;
    }
    if (is_double) add<double>(base, ranks, bytes, round, own, out);
    else add<float>(base, ranks, bytes, round, own, out);
    return -1;
}
}
