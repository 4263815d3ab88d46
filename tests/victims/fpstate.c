/* Floating-point state: x87 with its control word, MXCSR rounding, AVX and AVX-512 registers kept live over long
 * loops. A stop that does not give back all of it shows in the sum.
 * flags: -frounding-math -ffp-contract=off
 * libs: -lm */
#include <fenv.h>
#include <immintrin.h>
#include "victim.h"

static NOINLINE u64 bits(double d)
{
    u64 u;
    memcpy(&u, &d, sizeof u);
    return u;
}

/* Everything stays in st(0)..st(3) for the whole loop. */
static NOINLINE u64 x87(u64 seed, u32 n)
{
    long double a = 1.0L + (long double)(seed % 97) / 97, b = 3.14159L;
    double out;
    __asm__ volatile("fldt %2\n\t"
                     "fldt %1\n\t"
                     "1: fmul %%st(1), %%st\n\t"
                     "fsqrt\n\t"
                     "fadd %%st(1), %%st\n\t"
                     "fprem\n\t"
                     "fld1\n\t"
                     "faddp\n\t"
                     "dec %3\n\t"
                     "jnz 1b\n\t"
                     "fstpl %0\n\t"
                     "fstp %%st(0)"
                     : "=m"(out), "+m"(a), "+m"(b), "+r"(n)::"cc", "memory", "st", "st(1)", "st(2)");
    return bits(out);
}

static NOINLINE u64 rounded(int mode, u64 seed)
{
    volatile double x = 1.0 + (double)(seed % 1000) / 7.0, y = 0;
    if (fesetround(mode)) victim_fail("fesetround", (u64)mode, 0);
    for (int i = 1; i < 2000; i++) {
        y = y + x / i;
        x = x * 0.9999 + 1.0 / 3.0;
    }
    CHECK("the rounding mode", fegetround(), mode);
    u64 h = mix(bits(x), bits(y));
    fesetround(FE_TONEAREST);
    return h;
}

__attribute__((target("avx"))) static NOINLINE u64 avx(u64 seed, u32 n)
{
    double in[16], out[16];
    for (int i = 0; i < 16; i++) in[i] = 1.0 + (double)((seed >> i) & 255) / 256;
    __asm__ volatile("vmovupd (%1), %%ymm0\n\t"
                     "vmovupd 32(%1), %%ymm7\n\t"
                     "vmovupd 64(%1), %%ymm12\n\t"
                     "vmovupd 96(%1), %%ymm15\n\t"
                     "1: vmulpd %%ymm7, %%ymm0, %%ymm0\n\t"
                     "vsqrtpd %%ymm0, %%ymm0\n\t"
                     "vaddpd %%ymm12, %%ymm15, %%ymm15\n\t"
                     "vdivpd %%ymm0, %%ymm15, %%ymm15\n\t"
                     "vpermilpd $5, %%ymm7, %%ymm7\n\t"
                     "dec %0\n\t"
                     "jnz 1b\n\t"
                     "vmovupd %%ymm0, (%2)\n\t"
                     "vmovupd %%ymm7, 32(%2)\n\t"
                     "vmovupd %%ymm12, 64(%2)\n\t"
                     "vmovupd %%ymm15, 96(%2)\n\t"
                     "vzeroupper"
                     : "+r"(n)
                     : "r"(in), "r"(out)
                     : "cc", "memory", "xmm0", "xmm7", "xmm12", "xmm15");
    u64 h = 0;
    for (int i = 0; i < 16; i++) h = mix(h, bits(out[i]));
    return h;
}

__attribute__((target("avx512f"))) static NOINLINE u64 avx512(u64 seed, u32 n)
{
    u64 in[16], out[16], mask = 0;
    for (int i = 0; i < 16; i++) in[i] = seed * (u64)(2 * i + 1);
    __asm__ volatile("vmovdqu64 (%2), %%zmm3\n\t"
                     "vmovdqu64 64(%2), %%zmm31\n\t"
                     "kxnorw %%k1, %%k1, %%k3\n\t"
                     "1: vpaddq %%zmm31, %%zmm3, %%zmm3\n\t"
                     "vprolq $7, %%zmm3, %%zmm3\n\t"
                     "vpcmpuq $1, %%zmm31, %%zmm3, %%k2\n\t"
                     "kxorw %%k2, %%k3, %%k3\n\t"
                     "vpxorq %%zmm3, %%zmm31, %%zmm31 %{%%k3%}\n\t"
                     "dec %0\n\t"
                     "jnz 1b\n\t"
                     "vmovdqu64 %%zmm3, (%3)\n\t"
                     "vmovdqu64 %%zmm31, 64(%3)\n\t"
                     "kmovw %%k3, %k1\n\t"
                     "vzeroupper"
                     : "+r"(n), "=&r"(mask)
                     : "r"(in), "r"(out)
                     : "cc", "memory", "xmm3", "xmm31", "k1", "k2", "k3");
    u64 h = mask & 0xffff;
    for (int i = 0; i < 16; i++) h = mix(h, out[i]);
    return h;
}

static u64 work(u64 seed)
{
    static const int modes[] = {FE_UPWARD, FE_DOWNWARD, FE_TOWARDZERO, FE_TONEAREST};
    u64 h = x87(seed, 3000);
    for (int i = 0; i < 4; i++) h = mix(h, rounded(modes[i], seed));
    if (__builtin_cpu_supports("avx")) h = mix(h, avx(seed, 3000));
    if (__builtin_cpu_supports("avx512f")) h = mix(h, avx512(seed, 20000));
    return h;
}

VICTIM_MAIN(NULL, work)
