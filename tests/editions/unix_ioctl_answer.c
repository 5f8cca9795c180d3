// SPDX-License-Identifier: Apache-2.0 OR MIT
/* An edition to be measured: see answer.h. */
#include "answer.h"
#include "exopatch.h"

EXOPATCH_REPLACES(unix_ioctl, answer);

EXOPATCH_PREDICATE(of_marks, struct socket *sock, unsigned int cmd, unsigned long arg)
{
	return cmd == SIOCATMARK;
}
