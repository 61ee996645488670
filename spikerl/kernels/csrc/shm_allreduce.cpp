// All-reduce over the processes of one machine through shared memory, which holds, for each rank, the number of rounds
// that it has written, then two slots for each rank, used alternately. A rank writes a round's vector only after it has
// read all vectors of the round before, so no slot is overwritten before all ranks have read it. All ranks add in the
// order of ranks: the sums are bitwise equal everywhere.

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>
#include <cstdint>
#include <cstring>
#include <ctime>

#include "memory.h"

namespace {

struct alignas(64) Rounds {  // a cache line each, because every rank writes its own
    std::atomic<uint32_t> written;
};

struct SharedMemory {
    Arena memory;
    int ranks;
    int64_t bytes;  // of a vector
    Rounds* rounds;
    char* slots;

    SharedMemory(char* base, int ranks_, int64_t bytes_)
        : memory(base),
          ranks(ranks_),
          bytes(bytes_),
          rounds(memory.array<Rounds>(ranks)),
          slots(memory.array<char>(2 * ranks * bytes)) {}

    char* slot(uint32_t round, int rank) const { return slots + ((round & 1) * ranks + rank) * bytes; }
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

constexpr int SPINS = 2000;           // some tens of microseconds
constexpr long WAIT_NS = 20'000'000;  // length of one futex wait

template <class X>
void sum(const SharedMemory& shared, uint32_t round, int own, char* out) {
    constexpr int64_t PART = 512;  // numbers that stay in the first-level cache
    X* sums = reinterpret_cast<X*>(out);
    const int64_t n = shared.bytes / int64_t(sizeof(X));
    auto of_rank = [&](int rank) { return reinterpret_cast<const X*>(shared.slot(round, rank)); };
    if (shared.ranks == 2) {  // addition commutes, and `out` equals the own slot
        const X* other = of_rank(1 - own);
        for (int64_t i = 0; i < n; i++) sums[i] += other[i];
        return;
    }
    for (int64_t first = 0; first < n; first += PART) {
        const int64_t count = n - first < PART ? n - first : PART;
        std::memcpy(sums + first, of_rank(0) + first, count * sizeof(X));
        for (int rank = 1; rank < shared.ranks; rank++) {
            const X* other = of_rank(rank) + first;
            for (int64_t i = 0; i < count; i++) sums[first + i] += other[i];
        }
    }
}

}  // namespace

extern "C" {

// Bytes of shared memory for vectors of `bytes` bytes.
int64_t spikerl_shm_bytes(int ranks, int64_t bytes) { return SharedMemory(nullptr, ranks, bytes).memory.used; }

// Writes this process's vector; `round` counts from 0.
void spikerl_shm_write(char* base, int rank, int ranks, int64_t bytes, uint32_t round, const char* vector) {
    const SharedMemory shared(base, ranks, bytes);
    std::memcpy(shared.slot(round, rank), vector, bytes);
    std::atomic<uint32_t>& written = shared.rounds[rank].written;
    written.store(round + 1, std::memory_order_release);
    wake(&written);
}

// Replaces `out`, the vector that this process has written, by the sum over all ranks and returns -1; or leaves `out`
// unchanged and returns a rank that did not write its vector within the wait.
int spikerl_shm_sum(char* base, int own, int ranks, int64_t bytes, uint32_t round, char* out, bool is_double) {
    const SharedMemory shared(base, ranks, bytes);
    for (int rank = 0; rank < ranks; rank++) {
        std::atomic<uint32_t>& written = shared.rounds[rank].written;
        for (int spin = 0; spin < SPINS && int32_t(written.load(std::memory_order_acquire) - round) <= 0; spin++) {
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
        }
        const uint32_t seen = written.load(std::memory_order_acquire);
        if (int32_t(seen - round) > 0) continue;
        wait_for(&written, seen, WAIT_NS);
        if (int32_t(written.load(std::memory_order_acquire) - round) <= 0) return rank;
    }
    if (is_double) sum<double>(shared, round, own, out);
    else sum<float>(shared, round, own, out);
    return -1;
}
}
