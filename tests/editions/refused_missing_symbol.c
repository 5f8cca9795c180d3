// SPDX-License-Identifier: Apache-2.0 OR MIT
/* Calls a function that no kernel has. */
#include <linux/net.h>

#include "exopatch.h"

extern int exopatch_test_no_kernel_has_this(void);
static int unix_ioctl_missing(struct socket *sock, unsigned int cmd, unsigned long arg);
EXOPATCH_REPLACES(unix_ioctl, unix_ioctl_missing);

static int unix_ioctl_missing(struct socket *sock, unsigned int cmd, unsigned long arg)
{
	return exopatch_test_no_kernel_has_this();
}
