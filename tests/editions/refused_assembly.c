// SPDX-License-Identifier: Apache-2.0 OR MIT
/* Replaces a function that is written in assembly, and called in a way of its own. */
#include <linux/types.h>

#include "exopatch.h"

static unsigned long no_assembly(__u64 w);
EXOPATCH_REPLACES(__sw_hweight64, no_assembly);

static unsigned long no_assembly(__u64 w)
{
	return 0;
}
