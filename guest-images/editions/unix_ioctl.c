// SPDX-License-Identifier: Apache-2.0 OR MIT
/*
 * CVE-2026-52928: only stream sockets have out-of-band data, so only they can be at its mark. An AF_UNIX socket of
 * another type answers SIOCATMARK with EOPNOTSUPP, as Debian's 6.1.177-1 and later do.
 */
#include <linux/net.h>
#include <linux/sockios.h>
#include <net/sock.h>

#include "exopatch.h"

static int unix_ioctl_checked(struct socket *sock, unsigned int cmd, unsigned long arg);
EXOPATCH_REPLACES(unix_ioctl, unix_ioctl_checked);

static int unix_ioctl_checked(struct socket *sock, unsigned int cmd, unsigned long arg)
{
	if (cmd == SIOCATMARK && sock->sk->sk_type != SOCK_STREAM)
		return -EOPNOTSUPP;
	return EXOPATCH_ORIGINAL(unix_ioctl)(sock, cmd, arg);
}
