/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * What an edition leaves for guest programs to see, wherever it runs: it adds to a number of the kernel's that they read and set as
 * /proc/sys/kernel/panic_print, and that means something in a panic alone. A call that was as expected adds 1, another WITNESS_OTHER.
 */
#include <linux/atomic.h>
#include <linux/panic.h>

#include "exopatch.h"

#define WITNESS_OTHER (1L << 40)

static __always_inline void witness(bool as_expected)
{
	atomic_long_add(as_expected ? 1 : WITNESS_OTHER, (atomic_long_t *)&panic_print);
}
