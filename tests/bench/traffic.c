/* SPDX-License-Identifier: Apache-2.0 */
/* The benchmark's clients and servers: as little of their own as possible, so that the kernel's work is what is measured.
 *
 *   traffic serve PORT LOG                 accepts and answers; writes its ledger to LOG at SIGUSR1, and begins another
 *   traffic short ADDRESS:PORT...          short TCP connections, to one service after the other
 *   traffic failed ADDRESS:PORT...         connects that are refused
 *   traffic udp ADDRESS:PORT...            one query and one answer from a fresh connected UDP socket each
 *   traffic long COUNT ADDRESS:PORT...     COUNT open connections, one exchange after the other over all of them
 *   traffic packets ADDRESS:PORT           one byte there and back on one connection
 *   traffic calls                          getppid(2)
 *
 * A client says "ready", then reads lines "SECONDS", works for so long each time, and answers with a line "OPERATIONS
 * FAILURES NANOSECONDS". Failures are operations that went as they should not. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define REQUEST 100
#define RESPONSE 400

/* What a client says first: how it reached the server, and who it is, which the server cannot see. */
struct request {
	uint32_t response;
	uint16_t dialled; /* the service's port, in host order */
	uint16_t port;	  /* the client's own, in network order, or 0: conntrack may have changed it on the way */
};

/* A line of the server's ledger: addresses and ports in network order, but for the service's port. `peer_port` is what
 * the client says of itself, or else what the server sees. */
struct accepted {
	uint32_t peer, local;
	uint16_t peer_port, dialled;
	uint32_t protocol;
};

struct peer {
	struct accepted accepted;
	int known; /* its first request has come */
};

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static int64_t now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000000000LL + time.tv_nsec;
}

static void many_descriptors(void)
{
	struct rlimit limit;

	getrlimit(RLIMIT_NOFILE, &limit);
	limit.rlim_cur = limit.rlim_max;
	setrlimit(RLIMIT_NOFILE, &limit);
}

/* ---- the server ---- */

static struct accepted *ledger;
static size_t ledger_used, ledger_room;
static volatile sig_atomic_t wanted;

static void want(int signal)
{
	(void)signal;
	wanted = 1;
}

static void hand_over(const char *path)
{
	FILE *log = fopen(path, "w");

	if (!log || fwrite(ledger, sizeof(*ledger), ledger_used, log) != ledger_used || fclose(log))
		die(path);
	ledger_used = 0;
	wanted = 0;
	puts("written");
	fflush(stdout);
}

static void note(const struct accepted *line)
{
	if (ledger_used == ledger_room) {
		ledger_room = ledger_room ? 2 * ledger_room : 1 << 16;
		ledger = realloc(ledger, ledger_room * sizeof(*ledger));
		if (!ledger)
			die("realloc");
	}
	ledger[ledger_used++] = *line;
}

/* Descriptors are small numbers: what belongs to each is found by it. */
static struct peer *peers;
static int peers_room;

static struct peer *peer_of(int fd)
{
	if (fd >= peers_room) {
		int room = fd + 1024;

		peers = realloc(peers, room * sizeof(*peers));
		if (!peers)
			die("realloc");
		memset(peers + peers_room, 0, (room - peers_room) * sizeof(*peers));
		peers_room = room;
	}
	return &peers[fd];
}

static void watch(int epoll, int fd)
{
	struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};

	if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event))
		die("epoll_ctl");
}

static void accept_all(int epoll, int listener)
{
	for (;;) {
		struct sockaddr_in from, to;
		socklen_t size = sizeof(from), to_size = sizeof(to);
		int fd = accept4(listener, (struct sockaddr *)&from, &size, SOCK_NONBLOCK);
		struct peer *peer;

		if (fd < 0)
			return;
		getsockname(fd, (struct sockaddr *)&to, &to_size);
		peer = peer_of(fd);
		*peer = (struct peer){.accepted = {.peer = from.sin_addr.s_addr,
						   .local = to.sin_addr.s_addr,
						   .peer_port = from.sin_port,
						   .protocol = IPPROTO_TCP}};
		watch(epoll, fd);
	}
}

static void answer(int fd, char *buffer, size_t room)
{
	struct peer *peer = peer_of(fd);
	ssize_t size = recv(fd, buffer, room, 0);
	struct request request;

	if (size < 0 && errno == EAGAIN)
		return;
	if (size <= 0) {
		note(&peer->accepted);
		close(fd);
		return;
	}
	if ((size_t)size < sizeof(request))
		memset(&request, 0, sizeof(request)), request.response = size; /* a packet of traffic packets */
	else
		memcpy(&request, buffer, sizeof(request));
	if (!peer->known && (size_t)size >= sizeof(request)) {
		peer->known = 1;
		peer->accepted.dialled = request.dialled;
		if (request.port)
			peer->accepted.peer_port = request.port;
	}
	if (request.response > room)
		request.response = room;
	if (send(fd, buffer, request.response, MSG_NOSIGNAL) < 0 && errno != EPIPE && errno != ECONNRESET)
		die("send");
}

static void answer_datagrams(int fd, char *buffer, size_t room, uint32_t local)
{
	for (;;) {
		struct sockaddr_in from;
		socklen_t from_size = sizeof(from);
		ssize_t size = recvfrom(fd, buffer, room, MSG_DONTWAIT, (struct sockaddr *)&from, &from_size);
		struct request request;
		struct accepted line;

		if (size < (ssize_t)sizeof(request))
			return;
		memcpy(&request, buffer, sizeof(request));
		line = (struct accepted){.peer = from.sin_addr.s_addr, .local = local, .peer_port = from.sin_port,
					 .dialled = request.dialled, .protocol = IPPROTO_UDP};
		note(&line);
		sendto(fd, buffer, request.response, 0, (struct sockaddr *)&from, from_size);
	}
}

static void serve(int port, const char *path)
{
	struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
	int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), udp = socket(AF_INET, SOCK_DGRAM, 0);
	int epoll = epoll_create1(0), one = 1;
	struct epoll_event events[64];
	static char buffer[1 << 16];
	sigset_t held, none;

	many_descriptors();
	/* Held but while it waits: a signal that came just before would otherwise be waited out. */
	sigemptyset(&none);
	sigemptyset(&held);
	sigaddset(&held, SIGUSR1);
	sigprocmask(SIG_BLOCK, &held, NULL);
	sigaction(SIGUSR1, &(struct sigaction){.sa_handler = want}, NULL);
	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	setsockopt(listener, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one)); /* inherited */
	if (bind(listener, (struct sockaddr *)&address, sizeof(address)) || listen(listener, 4096) ||
	    bind(udp, (struct sockaddr *)&address, sizeof(address)))
		die("bind");
	watch(epoll, listener);
	watch(epoll, udp);
	puts("ready");
	fflush(stdout);
	for (;;) {
		int count = epoll_pwait(epoll, events, 64, -1, &none);

		if (wanted)
			hand_over(path);

		for (int i = 0; i < count; i++) {
			int fd = events[i].data.fd;

			if (fd == listener)
				accept_all(epoll, listener);
			else if (fd == udp)
				answer_datagrams(udp, buffer, sizeof(buffer), 0);
			else
				answer(fd, buffer, sizeof(buffer));
		}
	}
}

/* ---- the clients ---- */

static struct sockaddr_in *targets;
static int target_count;

/* One exchange; 0 if it went as it should. */
static int exchange(int fd, const struct sockaddr_in *target, char *buffer, uint16_t port)
{
	struct request request = {
		.response = RESPONSE, .dialled = ntohs(target->sin_port), .port = port};
	size_t got = 0;

	memcpy(buffer, &request, sizeof(request));
	if (send(fd, buffer, REQUEST, MSG_NOSIGNAL) != REQUEST)
		return -1;
	while (got < RESPONSE) {
		ssize_t size = recv(fd, buffer, RESPONSE, 0);

		if (size <= 0)
			return -1;
		got += size;
	}
	return 0;
}

static int dial(int kind, const struct sockaddr_in *target)
{
	struct timeval patience = {.tv_sec = 2};
	int fd = socket(AF_INET, kind, 0);

	if (fd < 0)
		return -1;
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
	if (connect(fd, (const struct sockaddr *)target, sizeof(*target))) {
		int error = errno;

		close(fd);
		errno = error;
		return -1;
	}
	return fd;
}

static int connect_once(int kind, const struct sockaddr_in *target)
{
	char buffer[RESPONSE];
	struct sockaddr_in own = {0};
	socklen_t size = sizeof(own);
	int fd = dial(kind, target), failed;

	if (fd < 0)
		return -1;
	getsockname(fd, (struct sockaddr *)&own, &size);
	failed = exchange(fd, target, buffer, own.sin_port);
	close(fd);
	return failed;
}

static int be_refused(const struct sockaddr_in *target)
{
	int fd = dial(SOCK_STREAM, target);

	if (fd >= 0)
		close(fd);
	return fd < 0 && errno == ECONNREFUSED ? 0 : -1;
}

static int *held, held_count, turn;

static void hold(int count)
{
	many_descriptors();
	held = malloc(count * sizeof(*held));
	for (held_count = 0; held_count < count; held_count++) {
		held[held_count] = dial(SOCK_STREAM, &targets[held_count % target_count]);
		if (held[held_count] < 0)
			die("connect");
	}
}

static int exchange_on_next(void)
{
	char buffer[RESPONSE];

	turn = (turn + 1) % held_count;
	return exchange(held[turn], &targets[turn % target_count], buffer, 0);
}

static int ping(void)
{
	char byte = 0;

	return send(held[0], &byte, 1, MSG_NOSIGNAL) == 1 && recv(held[0], &byte, 1, 0) == 1 ? 0 : -1;
}

static int once(const char *what, const struct sockaddr_in *target)
{
	if (!strcmp(what, "short"))
		return connect_once(SOCK_STREAM, target);
	if (!strcmp(what, "udp"))
		return connect_once(SOCK_DGRAM, target);
	if (!strcmp(what, "failed"))
		return be_refused(target);
	if (!strcmp(what, "long"))
		return exchange_on_next();
	if (!strcmp(what, "packets"))
		return ping();
	syscall(SYS_getppid);
	return 0;
}

static void work(const char *what)
{
	/* Cheap operations are done many at a time between two looks at the clock. */
	int batch = !strcmp(what, "calls") ? 10000 : 1;
	double seconds;

	puts("ready");
	fflush(stdout);
	while (scanf("%lf", &seconds) == 1) {
		int64_t began = now(), until = began + (int64_t)(seconds * 1e9), time = began;
		long done = 0, failed = 0;

		while (time < until) {
			for (int i = 0; i < batch; i++)
				failed += once(what, target_count ? &targets[done % target_count] : NULL) != 0;
			done += batch;
			time = now();
		}
		printf("%ld %ld %lld\n", done, failed, (long long)(time - began));
		fflush(stdout);
	}
}

static void read_targets(int count, char **arguments)
{
	targets = calloc(count, sizeof(*targets));
	for (target_count = 0; target_count < count; target_count++) {
		struct sockaddr_in *target = &targets[target_count];
		char *colon = strchr(arguments[target_count], ':');

		if (colon)
			*colon = 0;
		if (!colon || inet_pton(AF_INET, arguments[target_count], &target->sin_addr) != 1) {
			fprintf(stderr, "%s is not ADDRESS:PORT\n", arguments[target_count]);
			exit(2);
		}
		target->sin_family = AF_INET;
		target->sin_port = htons(atoi(colon + 1));
	}
}

int main(int argc, char **argv)
{
	const char *what = argc > 1 ? argv[1] : "";
	int one = 1;

	if (!strcmp(what, "serve") && argc == 4) {
		serve(atoi(argv[2]), argv[3]);
		return 0;
	}
	if (!strcmp(what, "long") && argc > 3) {
		read_targets(argc - 3, argv + 3);
		hold(atoi(argv[2]));
	} else if (argc > 2) {
		read_targets(argc - 2, argv + 2);
	}
	if (!strcmp(what, "packets")) {
		hold(1);
		setsockopt(held[0], IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	}
	work(what);
	return 0;
}
