// SPDX-License-Identifier: Apache-2.0 OR MIT
/* A hook that sleeps longer than it is given. */
#include "hooks.h"

static int oversleeps(void)
{
	msleep(20000);
	return 0;
}
EXOPATCH_BEFORE_APPLY(oversleeps);
