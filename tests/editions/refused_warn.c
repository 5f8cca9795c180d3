// SPDX-License-Identifier: Apache-2.0 OR MIT
/* Holds a WARN, whose entry of the bug table could not be honoured. */
#include <linux/bug.h>
#include <linux/net.h>

#include "exopatch.h"

static int unix_ioctl_warn(struct socket *sock, unsigned int cmd, unsigned long arg);
EXOPATCH_REPLACES(unix_ioctl, unix_ioctl_warn);

static int unix_ioctl_warn(struct socket *sock, unsigned int cmd, unsigned long arg)
{
	WARN_ON(!cmd);
	return EXOPATCH_ORIGINAL(unix_ioctl)(sock, cmd, arg);
}
