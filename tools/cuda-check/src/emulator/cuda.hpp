// What of CUDA the kernels use, on one thread of a CPU: the threads of a block take turns, each until a barrier.
// They run in the opposite order from one barrier to the next, so that what a barrier is missing for is seen.

#include <math.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#ifndef __x86_64__
#include <ucontext.h>
#endif
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

enum State { RUNS, AT_BARRIER, AT_WARP, DONE };

// A thread of the block.
struct Fiber {
    void* context;
    State state;
};

static std::vector<Fiber> fibers;
static std::vector<char*> stacks;
static void* scheduler;
static unsigned current;
static char* shared;
static void (*kernel)(void**);
static void** arguments;

constexpr size_t STACK = 1 << 20, PAGE = 4096;
constexpr unsigned WARP = 32;

static void* pages(size_t bytes) {
    return mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}

// To another thread: `from` is where this one goes on, `to` where that one did.
#if defined(__x86_64__)
extern "C" void emulator_switch(void** from, void* to);
// What a call keeps is on the stacks. A thread that begins returns into `enter`.
asm(R"(
    .text
    .local emulator_switch
    .type emulator_switch, @function
emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size emulator_switch, . - emulator_switch
)");

static void begin(unsigned i, void (*enter)()) {
    void** top = reinterpret_cast<void**>(stacks[i] + STACK) - 1;
    *--top = reinterpret_cast<void*>(enter);
    fibers[i].context = top - 6;
}
#else
static std::vector<ucontext_t> contexts;
static ucontext_t main_context;

static void emulator_switch(void** from, void* to) {
    ucontext_t* here = from == &scheduler ? &main_context : &contexts[current];
    *from = here;
    swapcontext(here, static_cast<ucontext_t*>(to));
}

static void begin(unsigned i, void (*enter)()) {
    if (contexts.size() < stacks.size()) contexts.resize(stacks.size());
    getcontext(&contexts[i]);
    contexts[i].uc_stack.ss_sp = stacks[i];
    contexts[i].uc_stack.ss_size = STACK;
    makecontext(&contexts[i], enter, 0);
    fibers[i].context = &contexts[i];
}
#endif

// Lets the others run until what is waited for is there.
static void wait(State state) {
    Fiber& fiber = fibers[current];
    fiber.state = state;
    emulator_switch(&fiber.context, scheduler);
}

static void enter() {
    kernel(arguments);
    wait(DONE);
}

static void resume(unsigned i) {
    current = i;
    threadIdx = {i, 0, 0};
    emulator_switch(&scheduler, fibers[i].context);
}

// Lets all of `first..end` go on if they wait for each other.
static bool release(State state, unsigned first, unsigned end) {
    for (unsigned i = first; i < end; i++)
        if (fibers[i].state != state) return false;
    for (unsigned i = first; i < end; i++) fibers[i].state = RUNS;
    return true;
}

static void run_block(unsigned threads) {
    for (unsigned i = 0; i < threads; i++) {
        fibers[i].state = RUNS;
        begin(i, enter);
    }
    for (unsigned round = 0;;) {
        for (unsigned j = 0; j < threads; j++) {
            const unsigned i = round % 2 ? threads - 1 - j : j;
            if (fibers[i].state == RUNS) resume(i);
        }
        bool more = false;
        for (unsigned i = 0; i < threads; i += WARP) more |= release(AT_WARP, i, i + WARP < threads ? i + WARP : threads);
        if (more) continue;
        round++;
        if (release(AT_BARRIER, 0, threads)) continue;
        if (!release(DONE, 0, threads)) fail("some threads end where others wait at a barrier");
        return;
    }
}

// What each lane of a warp hands to all of them.
template <typename T> static const T* exchange(const T& mine) {
    static std::vector<T> handed[2];
    static std::vector<unsigned char> turns;
    for (auto& h : handed) h.resize(fibers.size());
    turns.resize(fibers.size());
    const unsigned i = current, turn = turns[i]++ % 2;
    handed[turn][i] = mine;
    wait(AT_WARP);
    return &handed[turn][i / WARP * WARP];
}

// Shared memory ends where no access is allowed, and begins as NaN.
static const char* launch(void (*entry)(void**), void** args, const unsigned* grid, unsigned threads, size_t bytes) {
    failure = nullptr;
    kernel = entry;
    arguments = args;
    fibers.assign(threads, Fiber());
    while (stacks.size() < threads) stacks.push_back(static_cast<char*>(pages(STACK)));
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

static void __syncthreads() { emulator::wait(emulator::AT_BARRIER); }

static void __syncwarp() { emulator::wait(emulator::AT_WARP); }

constexpr unsigned warpSize = 32;

template <typename T> static T min(T a, T b) { return a < b ? a : b; }
template <typename T> static T max(T a, T b) { return a > b ? a : b; }
static unsigned __umulhi(unsigned a, unsigned b) { return uint64_t(a) * b >> 32; }

static unsigned __activemask() { return ~0u; }

template <typename T> static T __shfl_sync(unsigned, T x, unsigned lane) {
    return emulator::exchange(x)[lane % emulator::WARP];
}

template <typename T> static T __shfl_up_sync(unsigned, T x, unsigned by) {
    const T* lanes = emulator::exchange(x);
    const unsigned lane = emulator::current % emulator::WARP;
    return lane < by ? x : lanes[lane - by];
}

template <typename T> static T __shfl_xor_sync(unsigned, T x, unsigned mask) {
    return emulator::exchange(x)[emulator::current % emulator::WARP ^ mask];
}

static uint32_t __cvta_generic_to_shared(const void* p) {
    return static_cast<const char*>(p) - emulator::shared;
}

// Instructions that kernels have in PTX.
namespace emulator::ptx {

// `N` matrices of 8 x 8 elements of 16 bits, a row at the address of each lane: lane `8 m + i` has row `i` of matrix `m`.
// A lane gets two neighbours of a row or, transposed, of a column.
template <int N, bool TRANSPOSED> static void ldmatrix(uint32_t* out, uint32_t address) {
    if (address % 16) fail("a matrix is not aligned");
    const uint32_t* rows = exchange(address);
    const unsigned lane = current % WARP, i = lane / 4, j = lane % 4 * 2;
    for (unsigned m = 0; m < N; m++) {
        uint16_t pair[2];
        for (unsigned n = 0; n < 2; n++) {
            const unsigned row = TRANSPOSED ? j + n : i, col = TRANSPOSED ? i : j + n;
            memcpy(&pair[n], shared + rows[8 * m + row] + 2 * col, 2);
        }
        memcpy(&out[m], pair, 4);
    }
}

// The same to the rows that the lanes name.
template <int N> static void stmatrix(uint32_t address, const uint32_t* in) {
    if (address % 16) fail("a matrix is not aligned");
    const uint32_t* rows = exchange(address);
    const unsigned lane = current % WARP;
    for (unsigned m = 0; m < N; m++) memcpy(shared + rows[8 * m + lane / 4] + 2 * (lane % 4 * 2), &in[m], 4);
}

template <typename T> static float element(const uint32_t* registers, unsigned i) {
    if constexpr (std::is_same_v<T, float>) return bits_of<float>(registers[i] & ~0x1fffu);
    else return bits_of<T>(static_cast<uint16_t>(registers[i / 2] >> 16 * (i % 2)));
}

// `d = a b + c`, 16 x K times K x 8, in the layout of `mma.sync`.
template <typename T, int K> static void mma(float* d, const uint32_t* a, const uint32_t* b, const float* c) {
    struct Operands {
        uint32_t a[4], b[2];
    } mine;
    memcpy(mine.a, a, sizeof mine.a);
    memcpy(mine.b, b, sizeof mine.b);
    const Operands* lanes = exchange(mine);
    // Of 32 bits, a register has one element; of 16 bits, two of neighbouring k.
    constexpr unsigned wide = sizeof(T) == 2 ? 2 : 1;
    const unsigned lane = current % WARP;
    for (unsigned r = 0; r < 4; r++) {
        const unsigned row = lane / 4 + r / 2 * 8, col = lane % 4 * 2 + r % 2;
        float sum = c[r];
        for (unsigned k = 0; k < K; k++) {
            const unsigned group = k / (4 * wide), quad = k % (4 * wide) / wide, n = k % wide;
            const Operands &x = lanes[row % 8 * 4 + quad], &y = lanes[col * 4 + quad];
            sum += element<T>(x.a, (row / 8 + 2 * group) * wide + n) * element<T>(y.b, group * wide + n);
        }
        d[r] = sum;
    }
}

}  // namespace emulator::ptx

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
