/* What the cores of this machine can do at best: multiply-add in float32, products of bfloat16 pairs summed in float32,
 * int8 products summed in int32 (VNNI), reading memory in huge pages (as weights lie) and in pages of 4 KB; and how long a cache line takes
 * from one core to another, which says whether they share a cache. Prints one JSON object. Compiled and run by roofline.py beside each benchmark, since shared machines drift.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

enum { CHAINS = 16, ROUNDS = 3, ITERATIONS = 6000000, PASSES = 20000, SPINS = 100000 };
static const size_t HUGE_PAGE = (size_t)2 << 20, BUFFER = (size_t)512 << 20; /* bytes; far beyond any cache */

typedef struct {
    double (*work)(int thread, int threads); /* returns operations or bytes */
    int thread, threads;
    pthread_barrier_t *start;
    double amount, began, ended;
} Task;

static char *buffer;
static atomic_long sink; /* keeps results alive */

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* Independent chains, more than the latency of an instruction times its throughput. */
static double fma32(int thread, int threads) {
    (void)thread, (void)threads;
#if defined(__AVX512F__)
    __m512 sums[CHAINS], x = _mm512_set1_ps(1.0f), y = _mm512_set1_ps(0.5f);
    for (int i = 0; i < CHAINS; i++) sums[i] = _mm512_setzero_ps();
    for (long n = 0; n < ITERATIONS; n++) {
        for (int i = 0; i < CHAINS; i++) sums[i] = _mm512_fmadd_ps(x, y, sums[i]);
        __asm__ volatile("" : "+v"(x), "+v"(y));
    }
    for (int i = 0; i < CHAINS; i++) atomic_fetch_add(&sink, (long)_mm512_reduce_add_ps(sums[i]));
    return 2.0 * 16 * CHAINS * ITERATIONS;
#elif defined(__AVX2__) && defined(__FMA__)
    __m256 sums[12], x = _mm256_set1_ps(1.0f), y = _mm256_set1_ps(0.5f);
    for (int i = 0; i < 12; i++) sums[i] = _mm256_setzero_ps();
    for (long n = 0; n < ITERATIONS; n++) {
        for (int i = 0; i < 12; i++) sums[i] = _mm256_fmadd_ps(x, y, sums[i]);
        __asm__ volatile("" : "+x"(x), "+x"(y));
    }
    for (int i = 0; i < 12; i++) atomic_fetch_add(&sink, (long)_mm256_cvtss_f32(sums[i]));
    return 2.0 * 8 * 12 * ITERATIONS;
#elif defined(__ARM_NEON)
    float32x4_t sums[CHAINS], x = vdupq_n_f32(1.0f), y = vdupq_n_f32(0.5f);
    for (int i = 0; i < CHAINS; i++) sums[i] = vdupq_n_f32(0.0f);
    for (long n = 0; n < ITERATIONS; n++) {
        for (int i = 0; i < CHAINS; i++) sums[i] = vfmaq_f32(sums[i], x, y);
        __asm__ volatile("" : "+w"(x), "+w"(y));
    }
    for (int i = 0; i < CHAINS; i++) atomic_fetch_add(&sink, (long)vgetq_lane_f32(sums[i], 0));
    return 2.0 * 4 * CHAINS * ITERATIONS;
#else
    return 0;
#endif
}

static double bf16(int thread, int threads) {
    (void)thread, (void)threads;
#if defined(__AVX512BF16__)
    __m512 sums[CHAINS];
    __m512i x = _mm512_set1_epi16(0x3f80), y = x; /* ones */
    for (int i = 0; i < CHAINS; i++) sums[i] = _mm512_setzero_ps();
    for (long n = 0; n < ITERATIONS; n++) {
        for (int i = 0; i < CHAINS; i++) sums[i] = _mm512_dpbf16_ps(sums[i], (__m512bh)x, (__m512bh)y);
        __asm__ volatile("" : "+v"(x), "+v"(y));
    }
    for (int i = 0; i < CHAINS; i++) atomic_fetch_add(&sink, (long)_mm512_reduce_add_ps(sums[i]));
    return 2.0 * 32 * CHAINS * ITERATIONS;
#else
    return 0;
#endif
}

#if defined(__AVX512VNNI__)
/* In assembly: GCC 12 copies the sums around the intrinsic, which halves the rate of some cores. */
static inline __m512i dot4(__m512i sum, __m512i x, __m512i y) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(y));
    return sum;
}
#endif

static double vnni(int thread, int threads) {
    (void)thread, (void)threads;
#if defined(__AVX512VNNI__)
    __m512i sums[CHAINS], x = _mm512_set1_epi8(1), y = x;
    for (int i = 0; i < CHAINS; i++) sums[i] = _mm512_setzero_si512();
    for (long n = 0; n < ITERATIONS; n++) {
#pragma GCC unroll 16
        for (int i = 0; i < CHAINS; i++) sums[i] = dot4(sums[i], x, y);
        __asm__ volatile("" : "+v"(x), "+v"(y));
    }
    for (int i = 0; i < CHAINS; i++) atomic_fetch_add(&sink, _mm512_reduce_add_epi32(sums[i]));
    return 2.0 * 64 * CHAINS * ITERATIONS;
#else
    return 0;
#endif
}

/* Each thread reads a part of its own, once. */
static double reading(int thread, int threads) {
    size_t part = BUFFER / (size_t)threads / 512 * 512;
    const char *from = buffer + part * (size_t)thread;
#if defined(__AVX512F__)
    __m512i seen[8];
    for (int i = 0; i < 8; i++) seen[i] = _mm512_setzero_si512();
    for (size_t at = 0; at < part; at += 512)
        for (int i = 0; i < 8; i++) seen[i] = _mm512_or_si512(seen[i], _mm512_load_si512(from + at + 64 * (size_t)i));
    long any = 0;
    for (int i = 0; i < 8; i++) any |= _mm512_reduce_or_epi64(seen[i]);
#else
    uint64_t seen[8] = {0};
    for (size_t at = 0; at < part; at += 64)
        for (int i = 0; i < 8; i++) seen[i] |= ((const uint64_t *)(from + at))[i];
    uint64_t any = 0;
    for (int i = 0; i < 8; i++) any |= seen[i];
#endif
    atomic_fetch_add(&sink, (long)any);
    return (double)part;
}

static _Alignas(128) atomic_long ball; /* alone in its line */

/* Two threads hand a line to and fro; returns how often it changed hands. */
static double passing(int thread, int threads) {
    (void)threads;
    for (long n = thread; n < 2 * PASSES; n += 2) {
        for (long spins = 1; atomic_load_explicit(&ball, memory_order_acquire) != n; spins++)
            if (spins % SPINS == 0) sched_yield(); /* perhaps both are on one core */
        atomic_store_explicit(&ball, n + 1 == 2 * PASSES ? 0 : n + 1, memory_order_release);
    }
    return 2.0 * PASSES;
}

static void *run(void *argument) {
    Task *task = argument;
    pthread_barrier_wait(task->start);
    task->began = now();
    task->amount = task->work(task->thread, task->threads);
    task->ended = now();
    return NULL;
}

/* Best of some rounds, in 1e9 per second over all threads. */
static double rate(double (*work)(int, int), int threads) {
    double best = 0;
    for (int round = 0; round < ROUNDS; round++) {
        pthread_t ids[threads];
        Task tasks[threads];
        pthread_barrier_t start;
        pthread_barrier_init(&start, NULL, (unsigned)threads);
        for (int i = 0; i < threads; i++) {
            tasks[i] = (Task){.work = work, .thread = i, .threads = threads, .start = &start};
            pthread_create(&ids[i], NULL, run, &tasks[i]);
        }
        double amount = 0, began = 1e300, ended = 0;
        for (int i = 0; i < threads; i++) {
            pthread_join(ids[i], NULL);
            amount += tasks[i].amount;
            if (tasks[i].began < began) began = tasks[i].began;
            if (tasks[i].ended > ended) ended = tasks[i].ended;
        }
        pthread_barrier_destroy(&start);
        if (amount / (ended - began) / 1e9 > best) best = amount / (ended - began) / 1e9;
    }
    return best;
}

/* Of a new buffer in pages as `advice` asks for; 0 where there is no memory. */
static double reading_rate(int threads, int advice) {
    buffer = aligned_alloc(HUGE_PAGE, BUFFER);
    if (!buffer) return 0;
    madvise(buffer, BUFFER, advice); /* refused where the system has one kind of pages only: both rates are then the same */
    for (size_t at = 0; at < BUFFER; at += 4096) buffer[at] = 1;
    double best = rate(reading, threads);
    free(buffer);
    return best;
}

int main(int count, char **words) {
    int threads = count > 1 ? atoi(words[1]) : 1;
    if (threads < 1) return 1;
    double huge = reading_rate(threads, MADV_HUGEPAGE), small = reading_rate(threads, MADV_NOHUGEPAGE);
    double passes = threads > 1 ? rate(passing, 2) : 0; /* in 1e9 per second, counted by both threads */
    printf("{\"threads\": %d, \"fma_gflops\": %.1f, \"bf16_gflops\": %.1f, \"vnni_gops\": %.1f, \"memory_gb_s\": %.2f, \"small_pages_gb_s\": %.2f, \"core_to_core_ns\": %.0f}\n",
           threads, rate(fma32, threads), rate(bf16, threads), rate(vnni, threads), huge, small, passes > 0 ? 2 / passes : 0);
    return 0;
}
