// SPDX-License-Identifier: Apache-2.0 OR MIT
/*
 * /proc/version says what ordinary kernel code finds here: features of the processor, static keys, per-CPU variables. It is all code
 * that the kernel changes in itself, at boot or later, and cannot change in an edition.
 */
#include <linux/bitops.h>
#include <linux/gfp.h>
#include <linux/jump_label.h>
#include <linux/mm.h>
#include <linux/printk.h>
#include <linux/sched.h>
#include <linux/seq_file.h>
#include <linux/smp.h>
#include <linux/spinlock.h>
#include <linux/string.h>
#include <asm/cpufeature.h>
#include <asm/msr.h>
#include <asm/processor.h>
#include <trace/events/power.h>

#include "exopatch.h"

static int version_proc_show_ordinary(struct seq_file *m, void *v);
EXOPATCH_REPLACES(version_proc_show, version_proc_show_ordinary);

/* One key of the kernel, as each of the two types that code may know it by. */
extern struct static_key_false sched_schedstats;
extern struct static_key_true schedstats_as_true __asm__("sched_schedstats");

static DEFINE_STATIC_KEY_TRUE(own_on);
static DEFINE_STATIC_KEY_FALSE(own_off);
static DEFINE_STATIC_KEY_FALSE(own_switched);
static DEFINE_SPINLOCK(lock);

#define SAY_FEATURE(NAME, FEATURE) seq_printf(m, "feature " NAME " %d\n", static_cpu_has(FEATURE))

static void say_features(struct seq_file *m)
{
	int chosen;

	SAY_FEATURE("smap", X86_FEATURE_SMAP);
	SAY_FEATURE("smep", X86_FEATURE_SMEP);
	SAY_FEATURE("la57", X86_FEATURE_LA57);
	SAY_FEATURE("pku", X86_FEATURE_PKU);
	SAY_FEATURE("erms", X86_FEATURE_ERMS);
	SAY_FEATURE("popcnt", X86_FEATURE_POPCNT);
	SAY_FEATURE("avx2", X86_FEATURE_AVX2);
	SAY_FEATURE("hypervisor", X86_FEATURE_HYPERVISOR);
	SAY_FEATURE("fsgsbase", X86_FEATURE_FSGSBASE);
	SAY_FEATURE("rdtscp", X86_FEATURE_RDTSCP);
	SAY_FEATURE("vmx", X86_FEATURE_VMX);
	SAY_FEATURE("avx512f", X86_FEATURE_AVX512F);
	SAY_FEATURE("monitor", X86_FEATURE_MWAIT);

	/* Longer than what is there by default, and shorter. */
	alternative_io("xorl %0, %0", "movl $1, %0", X86_FEATURE_SMEP, "=r" (chosen));
	seq_printf(m, "feature smep %d\n", chosen);
	alternative_io("xorl %0, %0", "movl $1, %0", X86_FEATURE_VMX, "=r" (chosen));
	seq_printf(m, "feature vmx %d\n", chosen);
	alternative_io("movl $1, %0", "xorl %0, %0", ALT_NOT(X86_FEATURE_POPCNT), "=r" (chosen));
	seq_printf(m, "feature popcnt %d\n", chosen);
}

/* All of these say whether the key is on. */
static void say_keys(struct seq_file *m)
{
	seq_printf(m, "schedstats %d %d %d %d\n",
		   static_branch_likely(&sched_schedstats) ? 1 : 0,
		   static_branch_unlikely(&sched_schedstats) ? 1 : 0,
		   static_branch_likely(&schedstats_as_true) ? 1 : 0,
		   static_branch_unlikely(&schedstats_as_true) ? 1 : 0);

	static_branch_enable(&own_switched);
	seq_printf(m, "own %d %d %d", static_branch_likely(&own_on) ? 1 : 0,
		   static_branch_unlikely(&own_off) ? 1 : 0,
		   static_branch_unlikely(&own_switched) ? 1 : 0);
	static_branch_disable(&own_switched);
	seq_printf(m, " %d\n", static_branch_unlikely(&own_switched) ? 1 : 0);
}

static void say_work(struct seq_file *m)
{
	unsigned long flags, page, word = 0xf0f0;
	u64 before, after;
	int locked;

	OPTIMIZER_HIDE_VAR(word);
	seq_printf(m, "weight %lu\n", hweight64(word));

	spin_lock_irqsave(&lock, flags);
	locked = irqs_disabled();
	spin_unlock_irqrestore(&lock, flags);
	seq_printf(m, "interrupts off %d, then %d\n", locked, irqs_disabled());

	page = __get_free_page(GFP_KERNEL);
	if (page) {
		memset((void *)page, 0x5a, PAGE_SIZE);
		clear_page((void *)page);
		seq_printf(m, "cleared %d\n", !memchr_inv((void *)page, 0, PAGE_SIZE));
		free_page(page);
	}

	before = rdtsc_ordered();
	might_sleep();
	cond_resched();
	after = rdtsc_ordered();
	seq_printf(m, "later %d\n", after > before);
}

static int version_proc_show_ordinary(struct seq_file *m, void *v)
{
	int cpu = get_cpu();

	seq_printf(m, "cpu %d\n", this_cpu_read(cpu_info.cpu_index) == cpu);
	put_cpu();
	seq_printf(m, "task %d %s\n", current->pid, current->comm);
	say_features(m);
	say_keys(m);
	say_work(m);

	/* The kernel's own event, with a number by which it is known. */
	trace_cpu_frequency(4711, 0);
	pr_debug("exopatch test: debugging\n");
	pr_info_ratelimited("exopatch test: limited\n");
	pr_warn_once("exopatch test: once\n");
	return EXOPATCH_ORIGINAL(version_proc_show)(m, v);
}
