// SPDX-License-Identifier: Apache-2.0 OR MIT
/* An edition in which threads sleep: it changes nothing, calls the original, and has work left when that comes back. */
#include <linux/hrtimer.h>

#include "exopatch.h"

static long nanosleep_same(ktime_t time, const enum hrtimer_mode mode, const clockid_t clock);
EXOPATCH_REPLACES(hrtimer_nanosleep, nanosleep_same);

static long nanosleep_same(ktime_t time, const enum hrtimer_mode mode, const clockid_t clock)
{
	long err = EXOPATCH_ORIGINAL(hrtimer_nanosleep)(time, mode, clock);

	barrier(); /* it has to return here */
	return err;
}
