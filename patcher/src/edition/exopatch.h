/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * What an edition says about itself. `exopatch build` puts this file beside the edition's source:
 *
 *	#include "exopatch.h"
 *
 *	static int my_edition(struct socket *sock, unsigned int cmd, unsigned long arg);
 *	EXOPATCH_REPLACES(unix_ioctl, my_edition);
 *
 *	static int my_edition(struct socket *sock, unsigned int cmd, unsigned long arg)
 *	{
 *		return EXOPATCH_ORIGINAL(unix_ioctl)(sock, cmd, arg);
 *	}
 *
 * The prototype of the edition must be that of the kernel's function: nothing can check it here.
 * Any function or variable of the kernel, exported or not, may be used after an `extern` declaration. Alternatives are those of the
 * guest's processor, and static keys, tracepoints and static calls follow the kernel's; pr_debug() stays silent.
 */
#ifndef EXOPATCH_H
#define EXOPATCH_H

#include <linux/compiler.h>
#include <linux/export.h>
#include <linux/init.h>
#include <linux/types.h>

#include "exopatch_kernel.h"

/* An edition is part of the kernel itself, although it is compiled as a module's object would be. */
#undef THIS_MODULE
#define THIS_MODULE ((struct module *)0)

/* The longest name of a kernel symbol, its NUL included. */
#define EXOPATCH_NAME_LEN 512

struct exopatch_edition {
	const void *edition;
	__u32 size;		/* of this record: tells readers its layout */
	__u32 position;		/* 0: the name must be unique; n: the nth of that name, by address */
	char function[EXOPATCH_NAME_LEN];
};

/* The build-id of the kernel that this was compiled for, in hexadecimal. */
static const char exopatch_kernel[] __used __section(".exopatch.kernel") = EXOPATCH_KERNEL;

/* The POSITIONth kernel function of that name, in address order from 1, gets EDITION, declared before, as a new edition. */
#define EXOPATCH_REPLACES_AT(FUNCTION, POSITION, EDITION)					\
	extern typeof(EDITION) exopatch_original_##FUNCTION;					\
	static const struct exopatch_edition exopatch_edition_of_##FUNCTION			\
		__used __section(".exopatch.editions") __aligned(8) = {				\
			.edition = EDITION,							\
			.size = sizeof(struct exopatch_edition),				\
			.position = POSITION,							\
			.function = #FUNCTION,							\
		}

/* The only kernel function of that name gets EDITION, declared before, as a new edition. */
#define EXOPATCH_REPLACES(FUNCTION, EDITION) EXOPATCH_REPLACES_AT(FUNCTION, 0, EDITION)

/* The function's original edition, to be called; after EXOPATCH_REPLACES. */
#define EXOPATCH_ORIGINAL(FUNCTION) exopatch_original_##FUNCTION

struct exopatch_predicate {
	const void *predicate;
	__u32 size;		/* of this record: tells readers its layout */
	__u32 reserved;
	char name[EXOPATCH_NAME_LEN];
};

/*
 * Begins the definition of a predicate: a function that the rule `predicate PREDICATE` asks on each call whether that is for the
 * edition. It returns a bool, and its parameters are those of the function, the first six at most:
 *
 *	EXOPATCH_PREDICATE(asks_for_mark, struct socket *sock, unsigned int cmd, unsigned long arg)
 *	{
 *		return cmd == SIOCATMARK;
 *	}
 *
 * It runs wherever the function is called: in any context, with any locks held. So it may call nothing but functions of its own package
 * that are no editions, directly, and neither sleep, nor warn, nor touch memory of users, nor enable or disable interrupts; else the package
 * is refused. It may read and write memory and what is the CPU's own (this_cpu_read). What may not be there it reads by
 * __get_kernel_nofault(). That it ends is for its author to see to: nothing can tell.
 */
#define EXOPATCH_PREDICATE(PREDICATE, ...)							\
	static bool PREDICATE(__VA_ARGS__);							\
	static const struct exopatch_predicate exopatch_predicate_##PREDICATE			\
		__used __section(".exopatch.predicates") __aligned(8) = {			\
			.predicate = PREDICATE,							\
			.size = sizeof(struct exopatch_predicate),				\
			.name = #PREDICATE,							\
		};										\
	static bool PREDICATE(__VA_ARGS__)

#endif
