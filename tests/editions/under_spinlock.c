// SPDX-License-Identifier: Apache-2.0 OR MIT
/* An edition of what every signal goes through: the original, and a witness that the receiver's lock was held. */
#include <linux/sched.h>
#include <linux/sched/signal.h>
#include <linux/spinlock.h>

#include "witness.h"

static int send_signal_seen(int sig, struct kernel_siginfo *info, struct task_struct *t, enum pid_type type);
EXOPATCH_REPLACES(send_signal_locked, send_signal_seen);

static int send_signal_seen(int sig, struct kernel_siginfo *info, struct task_struct *t, enum pid_type type)
{
	witness(spin_is_locked(&t->sighand->siglock) && irqs_disabled());
	return EXOPATCH_ORIGINAL(send_signal_locked)(sig, info, t, type);
}
