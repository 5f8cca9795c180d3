// SPDX-License-Identifier: Apache-2.0 OR MIT
/* A hook that keeps the edition from being applied. */
#include "hooks.h"

static int says_no(void)
{
	return -EBUSY;
}
EXOPATCH_BEFORE_APPLY(says_no);
