// SPDX-License-Identifier: Apache-2.0 OR MIT
/* A hook that keeps the edition from being reverted the first time. */
#include "hooks.h"

static int asked;

static int not_yet(void)
{
	return asked++ ? 0 : -EBUSY;
}
EXOPATCH_BEFORE_REVERT(not_yet);
