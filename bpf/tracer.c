/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* The attach points. Compiled by bcc (tracer/kernel/compiler.py), which passes as -D: kernel offsets (OFFSET_*), symbols
 * (*_FD, *_SYMBOL: symbols.h), and the options INCLUDE_LOOPBACK, NETNS_FILTER, ROLES (bits: 1 << enum role),
 * ONLY_VIRTUAL, EXCLUDE_CIDRS. */
#include "connection.h"
#include "conntrack.h"
#include "dial.h"
#include "iterator.h"

/* A tracing program that is interrupted on its CPU, by a softirq or (where tracepoints may be preempted) by another
 * task, is not run again inside itself: the kernel skips it and only recursion_misses tells (05b24ff9b2cf, 6.1).
 * With packets steered between CPUs about one state change in 200 is skipped. So whatever one event says can be
 * made up for by a later one: a missed SYN_SENT when the connection leaves that state, a missed ESTABLISHED (but
 * for the latency) by the next row, a missed CLOSE when the socket is destroyed, by a second program with a guard
 * of its own. */

/* Six of ten state changes of a short connection whose both ends are here. */
static __always_inline bool is_nothing_to_us(__u64 old_state, __u64 new_state)
{
	if (new_state == BPF_TCP_CLOSE || new_state == BPF_TCP_SYN_SENT)
		return false;
	return new_state != BPF_TCP_ESTABLISHED ||
	       (old_state != BPF_TCP_SYN_SENT && !(ROLES & 1 << ROLE_SERVER && old_state == BPF_TCP_SYN_RECV));
}

/* tp_btf/inet_sock_set_state: every state change of every TCP socket, in all namespaces.
 * Why: stable since 4.16, needs no kprobe. Context: SYN_SENT in that of connect()'s caller, the others anywhere. */
int socket_state(__u64 *ctx)
{
	const void *sk = (const void *)ctx[0];
	__u64 old_state = ctx[1], new_state = ctx[2];

	if (is_nothing_to_us(old_state, new_state))
		LEAVE(0);
	if (new_state == BPF_TCP_CLOSE || (new_state == BPF_TCP_ESTABLISHED && old_state == BPF_TCP_SYN_SENT))
		connection_moves(sk, old_state, new_state == BPF_TCP_CLOSE);
	else if (new_state == BPF_TCP_SYN_SENT)
		connection_begins(sk);
	else if (ROLES & 1 << ROLE_SERVER && new_state == BPF_TCP_ESTABLISHED && old_state == BPF_TCP_SYN_RECV)
		connection_accepted(sk);
	return 0;
}

/* tp_btf/inet_sock_set_state, after socket_state: takes what the kernel has not shown to it. Attached where tracepoints
 * may be preempted (7.0, a46023d5616e): a task that loses the CPU inside socket_state keeps it from seeing whatever this
 * CPU does until that task goes on, a time slice or more. This one has a guard of its own. */
int socket_state_again(__u64 *ctx)
{
	const void *sk = (const void *)ctx[0];
	__u64 old_state = ctx[1], new_state = ctx[2];

	if (is_nothing_to_us(old_state, new_state))
		LEAVE(0);
	if (new_state == BPF_TCP_CLOSE || (new_state == BPF_TCP_ESTABLISHED && old_state == BPF_TCP_SYN_SENT)) {
		if (has_not_moved(sk, new_state == BPF_TCP_CLOSE))
			connection_moves(sk, old_state, new_state == BPF_TCP_CLOSE);
	} else if (new_state == BPF_TCP_SYN_SENT) {
		if (has_not_begun(sk))
			connection_begins(sk);
	} else if (ROLES & 1 << ROLE_SERVER && new_state == BPF_TCP_ESTABLISHED && old_state == BPF_TCP_SYN_RECV) {
		if (has_not_begun(sk))
			connection_accepted(sk);
	}
	return 0;
}

/* tp_btf/tcp_destroy_sock: a TCP socket is about to be freed. Why: the second chance for an end that socket_state
 * missed, and the reason why no entry leaks; since 4.16. Context: any. */
int socket_destroyed(__u64 *ctx)
{
	socket_vanishes((const void *)ctx[0]);
	return 0;
}

/* socket filter on a netlink socket bound to conntrack's NEW and DESTROY groups. Why: the kernel runs it inside
 * conntrack's confirm, so the translation is in the map before the SYN has left; it is user-space API on every
 * kernel. Context: the packet's. It returns 0, so nothing is ever queued, and nothing overflows. */
int conntrack_events(struct __sk_buff *skb)
{
	conntrack_event(skb);
	return 0;
}

/* iter/tcp: every TCP socket of the namespace of whoever opened the iterator.
 * Why: the same socket pointers that the tracepoint sees, with their counters. Context: read() of the iterator. */
int bpf_iter__tcp(struct iterator_context *ctx)
{
	const void *sk = ctx->sk_common; /* NULL at the end of the walk */

	if (sk)
		sk = tcp_socket(sk);
	if (sk)
		visit(sk);
	return 0;
}

/* iter/udp: every UDP socket of the namespace of whoever opened the iterator. Context: read() of the iterator. */
struct datagram_context {
	const void *meta;
	const void *sk;
};

int bpf_iter__udp(struct datagram_context *ctx)
{
	if (ctx->sk)
		visit_datagrams(ctx->sk);
	return 0;
}

/* cgroup/sock_release: a socket is closed. Why: the last moment at which a connected UDP socket's tuple and process are
 * known together; 5.9+. It never refuses. Context: whoever closes it. The context is the struct sock itself. */
int socket_released(struct bpf_sock *ctx)
{
	__u8 state = 0;

	if (ctx->protocol != IPPROTO_UDP)
		LEAVE(1);
	PROBE(state, ctx, OFFSET_sock_common__skc_state);
	if (state == BPF_TCP_ESTABLISHED)
		datagrams_end(ctx);
	return 1;
}

/* tracepoint/syscalls/sys_enter_connect and sys_exit_connect: attached only where a balancer rewrites at the socket, or
 * by option, because they tax every system call of the node. Context: the caller's. */
int connect_enters(struct syscall_enter *ctx)
{
	dial_begins(ctx);
	return 0;
}

int connect_exits(struct syscall_exit *ctx)
{
	dial_ends(ctx);
	return 0;
}
