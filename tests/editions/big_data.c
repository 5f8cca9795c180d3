// SPDX-License-Identifier: Apache-2.0 OR MIT
/* Changes nothing, but brings so much data that a few of it fill the arena. */
#include <linux/net.h>

#include "exopatch.h"

static int unix_ioctl_big(struct socket *sock, unsigned int cmd, unsigned long arg);
EXOPATCH_REPLACES(unix_ioctl, unix_ioctl_big);

static char big[300 << 10] = "big";

static int unix_ioctl_big(struct socket *sock, unsigned int cmd, unsigned long arg)
{
	barrier_data(big);
	return EXOPATCH_ORIGINAL(unix_ioctl)(sock, cmd, arg);
}
