// SPDX-License-Identifier: Apache-2.0 OR MIT
/* An edition that reads and writes memory of the user: SIOCATMARK adds one to the number there, or says EXDEV if it cannot be read, ETIME if not written. */
#include <linux/net.h>
#include <linux/sockios.h>
#include <linux/uaccess.h>

#include "exopatch.h"

static int unix_ioctl_user(struct socket *sock, unsigned int cmd, unsigned long arg);
EXOPATCH_REPLACES(unix_ioctl, unix_ioctl_user);

static int unix_ioctl_user(struct socket *sock, unsigned int cmd, unsigned long arg)
{
	int __user *number = (int __user *)arg;
	int value;

	if (cmd != SIOCATMARK)
		return EXOPATCH_ORIGINAL(unix_ioctl)(sock, cmd, arg);
	if (get_user(value, number))
		return -EXDEV;
	return put_user(value + 1, number) ? -ETIME : 0;
}
