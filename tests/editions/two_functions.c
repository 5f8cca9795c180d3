// SPDX-License-Identifier: Apache-2.0 OR MIT
/* Two functions in one update: a datagram socket answers SIOCATMARK with EXDEV, and /proc/version is a line longer, which is its length. */
#include <linux/net.h>
#include <linux/seq_file.h>
#include <linux/sockios.h>
#include <net/sock.h>

#include "exopatch.h"

static int unix_ioctl_xdev(struct socket *sock, unsigned int cmd, unsigned long arg);
EXOPATCH_REPLACES(unix_ioctl, unix_ioctl_xdev);
static int version_proc_show_counted(struct seq_file *m, void *v);
EXOPATCH_REPLACES(version_proc_show, version_proc_show_counted);

static int unix_ioctl_xdev(struct socket *sock, unsigned int cmd, unsigned long arg)
{
	if (cmd == SIOCATMARK && sock->sk->sk_type != SOCK_STREAM)
		return -EXDEV;
	return EXOPATCH_ORIGINAL(unix_ioctl)(sock, cmd, arg);
}

static int version_proc_show_counted(struct seq_file *m, void *v)
{
	int err = EXOPATCH_ORIGINAL(version_proc_show)(m, v);

	seq_put_decimal_ull(m, NULL, m->count);
	seq_putc(m, '\n');
	return err;
}
