/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* The connect probe: what connect() was told, from its entry to its exit.
 *
 * A balancer at the socket (a cgroup/connect program, as Cilium's) changes the address inside connect(), so the
 * socket's peer is the backend already, and conntrack sees no rewrite. Here is also where a connect shows that fails
 * before SYN_SENT, and a UDP socket's process. connect() by io_uring does not pass here: such a connection is
 * `undialled`. */
#ifndef TRACER_DIAL_H
#define TRACER_DIAL_H

#include "datagram.h"

#define SS_UNCONNECTED 1
#define EPERM 1
#define EACCES 13
#define ENETDOWN 100
#define ENETUNREACH 101
#define ENOBUFS 105
#define EHOSTUNREACH 113

/* The arguments of a syscall tracepoint (events/syscalls/sys_enter_connect/format and the like). */
struct syscall_enter {
	__u64 common;
	__s64 number;
	__u64 arguments[6];
};

struct syscall_exit {
	__u64 common;
	__s64 number;
	__s64 result;
};

struct user_address {
	__u16 family;
	__u16 port;
	union {
		__u32 v4;
		struct {
			__u32 flow;
			__u32 v6[4];
		};
	};
};

/* The socket behind a descriptor of the current process; NULL if it is none. */
static __always_inline const void *socket_of(__u32 fd)
{
	const void *task = (const void *)bpf_get_current_task(), *files = NULL, *table = NULL, *file = NULL;
	const void *const *array = NULL, *socket = NULL;
	__u32 size = 0;

	PROBE(files, task, OFFSET_task_struct__files);
	PROBE(table, files, OFFSET_files_struct__fdt);
	PROBE(size, table, OFFSET_fdtable__max_fds);
	if (fd >= size)
		return NULL;
	PROBE(array, table, OFFSET_fdtable__fd);
	PROBE(file, array, fd * sizeof(file));
	PROBE(socket, file, OFFSET_file__private_data);
	return socket;
}

static __always_inline void dial_begins(const struct syscall_enter *context)
{
	__u64 thread = bpf_get_current_pid_tgid();
	struct user_address address = {};
	const void *socket, *sk = NULL;
	__u32 fd = context->arguments[0];
	struct dial dial = {};
	__u16 state = 0;

	probe_read_user(&address, 8, (const void *)context->arguments[1]);
	if (address.family == AF_INET) {
		set_v4(&dial.dst, address.v4);
	} else if (address.family == AF_INET6) {
		probe_read_user(&address, sizeof(address), (const void *)context->arguments[1]);
		for (int i = 0; i < 4; i++)
			dial.dst.words[i] = address.v6[i];
	} else {
		return; /* another family, or the end of a UDP socket's connection: nothing to tell */
	}
	/* What has an IP address for an argument is taken for a socket only if it looks like one all the way. */
	socket = socket_of(fd);
	PROBE(sk, socket, OFFSET_socket__sk);
	PROBE(dial.protocol, sk, OFFSET_sock__sk_protocol);
	PROBE(state, socket, OFFSET_socket__state);
	dial.sk = (__u64)sk;
	dial.port = address.port;
	dial.began = bpf_ktime_get_boot_ns();
	dial.fresh = state == SS_UNCONNECTED;
	if (bpf_map_update_elem_(DIALS, &thread, &dial, BPF_ANY))
		count(COUNT_LOST_DIAL_MAP);
}

/* A TCP connect that failed before there was anything to send. */
static __always_inline void dial_failed(const struct dial *dial, int error)
{
	const void *sk = (const void *)dial->sk;
	struct process process;
	struct record *record;
	struct row row = {};

	if (!read_tuple_probed(sk, &row.tuple, IPPROTO_TCP))
		return;
	row.netns = read_netns_probed(sk);
	row.tuple.dst = dial->dst;
	row.tuple.dst_port = dial->port;
	if (!wanted_netns(row.netns) || excluded_destination(&row.tuple.dst) || !(ROLES & 1 << ROLE_CLIENT))
		return;
	if (is_loopback(&row.tuple.dst) && !INCLUDE_LOOPBACK)
		return;
	if (control(CONTROL_PAUSE)) {
		count(COUNT_AFTER_PAUSE);
		return;
	}
	count(COUNT_FAILED);
	record = bpf_ringbuf_reserve(RECORDS, sizeof(*record), 0);
	if (!record) {
		count(COUNT_LOST_RING);
		return;
	}
	row.conn_id = next_conn_id();
	row.started = dial->began;
	row.role = ROLE_CLIENT;
	row.flags = FLAG_OPENED | FLAG_CLOSED | FLAG_COUNTED | (is_v4(&row.tuple.dst) ? FLAG_IPV4 : 0);
	read_process_probed(&process);
	set_process(&row, &process);
	__builtin_memset(record, 0, sizeof(*record));
	write_row(record, &row);
	record->ts = bpf_ktime_get_boot_ns();
	record->duration_ns = record->ts - dial->began;
	record->result = error;
	bpf_ringbuf_submit(record, BPF_RB_NO_WAKEUP);
	count(COUNT_CLOSED);
	count(COUNT_UNRESOLVED);
}

/* A UDP socket is connected. */
static __always_inline void dial_datagrams(const struct dial *dial)
{
	const void *sk = (const void *)dial->sk;
	struct owner owner = {};
	struct tuple tuple = {};

	if (!read_tuple_probed(sk, &tuple, IPPROTO_UDP))
		return;
	owner.netns = read_netns_probed(sk);
	if (!datagram_wanted(&tuple, owner.netns))
		return;
	if (!is_any(&dial->dst) && (dial->port != tuple.dst_port || !same_address(&dial->dst, &tuple.dst))) {
		owner.rewritten = 1;
		owner.dialled = dial->dst;
		owner.dialled_port = dial->port;
	}
	describe_owner(&owner);
	if (bpf_map_update_elem_(OWNERS, &tuple, &owner, BPF_ANY))
		count(COUNT_LOST_OWNER_MAP);
}

static __always_inline void dial_ends(const struct syscall_exit *context)
{
	__u64 thread = bpf_get_current_pid_tgid();
	struct dial *dial = bpf_map_lookup_elem_(DIALS, &thread);
	int error = -context->result;

	if (!dial)
		return;
	if (dial->protocol == IPPROTO_UDP && !error)
		dial_datagrams(dial);
	/* Other errors are of earlier attempts, of wrong arguments, or no failures (EINPROGRESS). */
	if ((dial->protocol == IPPROTO_TCP || dial->protocol == IPPROTO_MPTCP) && dial->fresh && !dial->sent &&
	    (error == ENETUNREACH || error == EHOSTUNREACH || error == EACCES || error == EPERM || error == ENETDOWN ||
	     error == ENOBUFS || error == EADDRNOTAVAIL))
		dial_failed(dial, error);
	DELETE(DIALS, &thread);
}

#endif
