// SPDX-License-Identifier: Apache-2.0 OR MIT
/*
 * An AF_UNIX socket that is not a stream socket answers SIOCATMARK with ENOTTY, where a predicate says so.
 */
#include <linux/net.h>
#include <linux/smp.h>
#include <linux/sockios.h>
#include <linux/uaccess.h>
#include <net/sock.h>

#include "exopatch.h"

static int unix_ioctl_asked(struct socket *sock, unsigned int cmd, unsigned long arg);
EXOPATCH_REPLACES(unix_ioctl, unix_ioctl_asked);

/* Where x86-64 kernels map nothing (Documentation/arch/x86/x86_64/mm.rst). */
static unsigned long nowhere = 0xffff800000001000;

static noinline int type_of(const struct sock *sk)
{
	return READ_ONCE(sk->sk_type);
}

EXOPATCH_PREDICATE(asks_for_mark, struct socket *sock, unsigned int cmd, unsigned long arg)
{
	return cmd == SIOCATMARK;
}

EXOPATCH_PREDICATE(asks_for_other, struct socket *sock, unsigned int cmd, unsigned long arg)
{
	return cmd != SIOCATMARK;
}

/* Through a function of the package and two pointers. */
EXOPATCH_PREDICATE(of_packets, struct socket *sock, unsigned int cmd, unsigned long arg)
{
	return sock->type == SOCK_SEQPACKET && type_of(sock->sk) == SOCK_SEQPACKET;
}

EXOPATCH_PREDICATE(on_odd_cpu, struct socket *sock, unsigned int cmd, unsigned long arg)
{
	return raw_smp_processor_id() & 1;
}

/* A load that faults goes on where the package's exception table says. */
EXOPATCH_PREDICATE(finds_nothing, struct socket *sock, unsigned int cmd, unsigned long arg)
{
	unsigned long word;

	__get_kernel_nofault(&word, (unsigned long *)READ_ONCE(nowhere), unsigned long, fault);
	return word == 1;
fault:
	return true;
}

/* Some calls, told by what the predicate itself has counted. */
EXOPATCH_PREDICATE(every_other, struct socket *sock, unsigned int cmd, unsigned long arg)
{
	static unsigned long calls;

	return __atomic_fetch_add(&calls, 1, __ATOMIC_RELAXED) & 1;
}

static int unix_ioctl_asked(struct socket *sock, unsigned int cmd, unsigned long arg)
{
	if (cmd == SIOCATMARK && sock->sk->sk_type != SOCK_STREAM)
		return -ENOTTY;
	return EXOPATCH_ORIGINAL(unix_ioctl)(sock, cmd, arg);
}
