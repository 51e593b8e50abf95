// What of CUDA the kernels use, on one thread of a CPU: the threads of a block take turns, each until a barrier.
// They run in the opposite order from one barrier to the next, so that what a barrier is missing for is seen.

#include <math.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <type_traits>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(threads)

struct uint3 {
    unsigned x, y, z;
};
static uint3 threadIdx, blockIdx, blockDim, gridDim;

template <typename To, typename From> static To bits_of(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

// A type of 16 bits whose arithmetic is that of f32, rounded to nearest even.
struct __nv_bfloat16 {
    uint16_t bits;
    __nv_bfloat16() = default;
    __nv_bfloat16(float x) {
        const uint32_t b = bits_of<uint32_t>(x);
        bits = x == x ? (b + 0x7fff + (b >> 16 & 1)) >> 16 : 0x7fff;
    }
    operator float() const { return bits_of<float>(uint32_t(bits) << 16); }
};

struct __half {
    _Float16 value;
    __half() = default;
    __half(float x) : value(static_cast<_Float16>(x)) {}
    operator float() const { return static_cast<float>(value); }
};

namespace emulator {

static const char* failure = nullptr;

static void fail(const char* why) {
    if (!failure) failure = why;
}

// A thread of the block.
struct Fiber {
    ucontext_t context;
    bool done;
};

static std::vector<Fiber> fibers;
static std::vector<void*> stacks;
static ucontext_t scheduler;
static unsigned current;
static char* shared;
static void (*kernel)(void**);
static void** arguments;

constexpr size_t STACK = 1 << 20, PAGE = 4096;

static void enter() {
    kernel(arguments);
    fibers[current].done = true;
}

static void* pages(size_t bytes) {
    return mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}

static void resume(unsigned i) {
    current = i;
    threadIdx = {i, 0, 0};
    swapcontext(&scheduler, &fibers[i].context);
}

static void run_block(unsigned threads) {
    for (unsigned i = 0; i < threads; i++) {
        Fiber& fiber = fibers[i];
        fiber.done = false;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = stacks[i];
        fiber.context.uc_stack.ss_size = STACK;
        fiber.context.uc_link = &scheduler;
        makecontext(&fiber.context, enter, 0);
    }
    for (unsigned round = 0;; round++) {
        for (unsigned i = 0; i < threads; i++) resume(round % 2 ? threads - 1 - i : i);
        unsigned done = 0;
        for (const Fiber& fiber : fibers) done += fiber.done;
        if (done == threads) return;
        if (done > 0) return fail("some threads end where others wait at a barrier");
    }
}

// Shared memory ends where no access is allowed, and begins as NaN.
static const char* launch(void (*entry)(void**), void** args, const unsigned* grid, unsigned threads, size_t bytes) {
    failure = nullptr;
    kernel = entry;
    arguments = args;
    fibers.assign(threads, Fiber());
    while (stacks.size() < threads) stacks.push_back(pages(STACK));
    const size_t room = (bytes + PAGE - 1) / PAGE * PAGE;
    char* memory = static_cast<char*>(pages(room + PAGE));
    mprotect(memory + room, PAGE, PROT_NONE);
    shared = memory + room - (bytes + 31) / 32 * 32;
    blockDim = {threads, 1, 1};
    gridDim = {grid[0], grid[1], grid[2]};
    for (unsigned z = 0; z < grid[2]; z++)
        for (unsigned y = 0; y < grid[1]; y++)
            for (unsigned x = 0; x < grid[0] && !failure; x++) {
                blockIdx = {x, y, z};
                memset(shared, 0xff, bytes);
                run_block(threads);
            }
    munmap(memory, room + PAGE);
    return failure;
}

template <typename... A, size_t... I>
static void call(void (*entry)(A...), void** args, std::index_sequence<I...>) {
    entry(*static_cast<std::remove_const_t<A>*>(args[I])...);
}

template <typename... A> static void call(void (*entry)(A...), void** args) {
    call(entry, args, std::index_sequence_for<A...>());
}

}  // namespace emulator

static void __syncthreads() {
    using namespace emulator;
    swapcontext(&fibers[current].context, &scheduler);
}

// Matrix units. A lane holds half a row of the result, and what it needs for it.
namespace nvcuda::wmma {

struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major, mem_col_major };
namespace precision {
struct tf32 {};
}

template <typename T> struct Element {
    using type = T;
};
template <> struct Element<precision::tf32> {
    using type = float;
};

// What the unit reads of an operand: of tf32 the leading 19 bits.
template <typename T> static float operand(typename Element<T>::type x) {
    if constexpr (std::is_same_v<T, precision::tf32>) return bits_of<float>(bits_of<uint32_t>(x) & ~0x1fffu);
    else return x;
}

static inline float __float_to_tf32(float x) {
    const uint32_t b = bits_of<uint32_t>(x);
    return x - x == 0 ? bits_of<float>((b + 0x1000) & ~0x1fffu) : x;
}

template <typename Use, int M, int N, int K, typename T, typename Layout = void> struct fragment {
    static_assert(M == 16 && N == 16, "the only shape in use");
    float x[K][8];
};
template <int M, int N, int K, typename T, typename Layout> struct fragment<matrix_a, M, N, K, T, Layout> {
    static_assert(M == 16 && N == 16, "the only shape in use");
    float x[K];
};
template <int M, int N, int K> struct fragment<accumulator, M, N, K, float, void> {
    static_assert(M == 16 && N == 16, "the only shape in use");
    float x[8];
};

static unsigned row() { return threadIdx.x % 32 / 2; }
static unsigned col() { return threadIdx.x % 2 * 8; }

template <typename P> static void aligned(const P* p, unsigned stride) {
    if (reinterpret_cast<uintptr_t>(p) % 32 || stride * sizeof(P) % 16) emulator::fail("a matrix is not aligned");
}

template <int M, int N, int K> static void fill_fragment(fragment<accumulator, M, N, K, float>& f, float x) {
    for (float& y : f.x) y = x;
}

template <int M, int N, int K, typename T, typename L, typename P>
static void load_matrix_sync(fragment<matrix_a, M, N, K, T, L>& f, const P* p, unsigned stride) {
    aligned(p, stride);
    for (unsigned k = 0; k < K; k++)
        f.x[k] = operand<T>(std::is_same_v<L, row_major> ? p[row() * stride + k] : p[k * stride + row()]);
}

template <int M, int N, int K, typename T, typename L, typename P>
static void load_matrix_sync(fragment<matrix_b, M, N, K, T, L>& f, const P* p, unsigned stride) {
    aligned(p, stride);
    for (unsigned k = 0; k < K; k++)
        for (unsigned j = 0; j < 8; j++)
            f.x[k][j] =
                operand<T>(std::is_same_v<L, row_major> ? p[k * stride + col() + j] : p[(col() + j) * stride + k]);
}

template <int M, int N, int K>
static void load_matrix_sync(fragment<accumulator, M, N, K, float>& f, const float* p, unsigned stride, layout_t l) {
    aligned(p, stride);
    for (unsigned j = 0; j < 8; j++)
        f.x[j] = l == mem_row_major ? p[row() * stride + col() + j] : p[(col() + j) * stride + row()];
}

template <int M, int N, int K>
static void store_matrix_sync(float* p, const fragment<accumulator, M, N, K, float>& f, unsigned stride, layout_t l) {
    aligned(p, stride);
    for (unsigned j = 0; j < 8; j++)
        (l == mem_row_major ? p[row() * stride + col() + j] : p[(col() + j) * stride + row()]) = f.x[j];
}

template <int M, int N, int K, typename T, typename A, typename B>
static void mma_sync(fragment<accumulator, M, N, K, float>& out, const fragment<matrix_a, M, N, K, T, A>& a,
                     const fragment<matrix_b, M, N, K, T, B>& b, const fragment<accumulator, M, N, K, float>& sum) {
    for (unsigned j = 0; j < 8; j++) {
        float s = sum.x[j];
        for (unsigned k = 0; k < K; k++) s += a.x[k] * b.x[k][j];
        out.x[j] = s;
    }
}

}  // namespace nvcuda::wmma
