/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/* What stands in for unix_ioctl when ways to replace a function are measured beside each other: the same code for each of them. */
#include <linux/net.h>
#include <linux/sockios.h>
#include <linux/uaccess.h>

static int answer(struct socket *sock, unsigned int cmd, unsigned long arg)
{
	return cmd == SIOCATMARK ? put_user(0, (int __user *)arg) : -ENOTTY;
}
