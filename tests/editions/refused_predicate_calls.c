// SPDX-License-Identifier: Apache-2.0 OR MIT
/*
 * A predicate that calls a function of the kernel, which could be redirected.
 */
#include <linux/net.h>
#include <linux/printk.h>

#include "exopatch.h"

static int unix_ioctl_asked(struct socket *sock, unsigned int cmd, unsigned long arg);
EXOPATCH_REPLACES(unix_ioctl, unix_ioctl_asked);

EXOPATCH_PREDICATE(prints, struct socket *sock, unsigned int cmd, unsigned long arg)
{
	return _printk("asked\n") != 0;
}

static int unix_ioctl_asked(struct socket *sock, unsigned int cmd, unsigned long arg)
{
	return EXOPATCH_ORIGINAL(unix_ioctl)(sock, cmd, arg);
}
