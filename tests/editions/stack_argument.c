// SPDX-License-Identifier: Apache-2.0 OR MIT
/*
 * An edition of a function whose seventh argument is on the stack: the original, and a witness that FUTEX_WAKE_OP was handed what the caller
 * gave. Callers have the operand in both the third argument and the seventh.
 */
#include <linux/mutex.h>
#include <linux/futex.h>
#include <linux/ktime.h>

#include "witness.h"

static long do_futex_seen(u32 __user *uaddr, int op, u32 val, ktime_t *timeout, u32 __user *uaddr2, u32 val2, u32 val3);
EXOPATCH_REPLACES(do_futex, do_futex_seen);

static long do_futex_seen(u32 __user *uaddr, int op, u32 val, ktime_t *timeout, u32 __user *uaddr2, u32 val2, u32 val3)
{
	witness((op & FUTEX_CMD_MASK) != FUTEX_WAKE_OP || (val3 >> 12 & 0xfff) == val);
	return EXOPATCH_ORIGINAL(do_futex)(uaddr, op, val, timeout, uaddr2, val2, val3);
}
