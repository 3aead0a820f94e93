/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* The attach points. Compiled by bcc (tracer/kernel/loader.py), which passes as -D: map descriptors (*_FD), kernel
 * offsets (OFFSET_*), and the options NODE_NETNS, RUN_ID, INTERVAL_NS, INCLUDE_LOOPBACK, NETNS_FILTER. */
#include "connection.h"
#include "conntrack.h"
#include "iterator.h"

/* A tracing program that is interrupted on its CPU, by a softirq or (where tracepoints may be preempted) by another
 * task, is not run again inside itself: the kernel skips it and only recursion_misses tells (05b24ff9b2cf, 6.1).
 * With packets steered between CPUs about one state change in 200 is skipped. So whatever one event says can be
 * made up for by a later one: a missed SYN_SENT when the connection leaves that state, a missed ESTABLISHED (but
 * for the latency) by the next row, a missed CLOSE when the socket is destroyed, by a second program with a guard
 * of its own. */

/* raw_tracepoint/inet_sock_set_state: every state change of every TCP socket, in all namespaces.
 * Why: stable since 4.16, needs no kprobe. Context: SYN_SENT in that of connect()'s caller, the others anywhere. */
int socket_state(struct bpf_raw_tracepoint_args *ctx)
{
	const void *sk = (const void *)ctx->args[0];
	int old_state = ctx->args[1], new_state = ctx->args[2];

	if (new_state == BPF_TCP_CLOSE)
		connection_ends(sk, old_state);
	else if (new_state == BPF_TCP_SYN_SENT)
		connection_begins(sk);
	else if (new_state == BPF_TCP_ESTABLISHED && old_state == BPF_TCP_SYN_SENT)
		connection_stands(sk);
	return 0;
}

/* raw_tracepoint/tcp_destroy_sock: a TCP socket is about to be freed. Why: the second chance for an end that
 * socket_state missed, and the reason why no entry leaks; since 4.16. Context: any. */
int socket_destroyed(struct bpf_raw_tracepoint_args *ctx)
{
	socket_vanishes((const void *)ctx->args[0]);
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
	if (ctx->sk_common) /* NULL at the end of the walk */
		visit(ctx->sk_common);
	return 0;
}
