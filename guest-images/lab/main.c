/* Which part of the lab's program this process is. */
#include "lab.h"

#include <string.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	if (getpid() == 1)
		return agent_main();
	if (argc > 1 && !strcmp(argv[1], "host"))
		return host_main(argc - 1, argv + 1);
	if (argc > 1 && !strcmp(argv[1], "run"))
		return run_main(argc - 1, argv + 1);
	fail("usage: lab host|run ...");
}
