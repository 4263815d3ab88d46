/* Who walks its own stack: _Unwind_Backtrace and backtrace must see the same number of frames as ever.
 * flags: -fexceptions -rdynamic */
#include <execinfo.h>
#include <unwind.h>
#include "victim.h"

static _Unwind_Reason_Code count(struct _Unwind_Context *c, void *arg)
{
    (void)c;
    ++*(u64 *)arg;
    return _URC_NO_REASON;
}

static NOINLINE u64 depth(void)
{
    u64 n = 0;
    _Unwind_Backtrace(count, &n);
    return n;
}

static NOINLINE u64 down(int n, u64 h)
{
    volatile u64 keep = mix(h, (u64)n);
    if (n == 0) {
        void *at[64];
        u64 d = depth();
        d = mix(d, (u64)backtrace(at, 64));
        return mix(h, d);
    }
    u64 r = down(n - 1, keep);
    return mix(r, keep);
}

static u64 work(u64 seed)
{
    u64 h = seed;
    for (int i = 0; i < 30; i++) h = mix(h, down(i, h));
    for (u64 i = 0; i < 3000; i++) h = mix(h, i);
    return h;
}

VICTIM_MAIN(NULL, work)
