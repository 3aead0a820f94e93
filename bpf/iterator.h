/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* What the socket iterator does with each TCP socket of a namespace: takes it in at the start, gives it a row when
 * its interval is over, and a last row when the tracer stops.
 *
 * It cannot race with the tracepoint for one socket: since 5.15 the kernel holds the socket's lock around the
 * program (04c7820b776f, "bpf: tcp: Bpf iter batching and lock_sock"), before that the hash bucket's, which
 * tcp_set_state(CLOSE) needs to unhash the socket before the tracepoint fires. Only the way to ESTABLISHED needs no
 * bucket: before 5.15 that may happen meanwhile. */
#ifndef TRACER_ITERATOR_H
#define TRACER_ITERATOR_H

#include "connection.h"

struct iterator_context {
	const void *meta;
	const void *sk_common;
};

static __always_inline __u64 listener_key(__u32 netns, __u16 port)
{
	return (__u64)netns << 16 | port;
}

static __always_inline void remember_listener(const void *sk)
{
	__u64 key;
	__u16 port;
	__u8 one = 1;

	READ(port, sk, OFFSET_sock_common__skc_num);
	key = listener_key(read_netns(sk), bpf_htons(port));
	if (bpf_map_update_elem_(LISTENERS, &key, &one, BPF_ANY))
		count(COUNT_LOST_LISTENER_MAP);
}

/* Accepted or dialled: by conntrack's original direction, else by a listener on the local port. */
static __always_inline bool was_accepted(const struct row *row)
{
	__u64 key = listener_key(row->netns, row->tuple.src_port);
	struct tuple tuple = row->tuple;

	if (find_translation(&tuple))
		return false;
	return bpf_map_lookup_elem_(LISTENERS, &key) != NULL;
}

static __always_inline void adopt(const void *sk, __u8 state)
{
	struct connection connection = {};
	struct row *row = &connection.row;
	long error;

	if (!describe(sk, row, ROLE_CLIENT))
		return; /* filtered by option: not offered */
	if (was_accepted(row)) {
		if (!(ROLES & 1 << ROLE_SERVER) || state == BPF_TCP_SYN_RECV)
			return; /* not asked for, or about to be accepted, which is counted */
		row->role = ROLE_SERVER;
		turn(&row->tuple);
	} else {
		row->dialled = unless_told();
	}
	if (excluded_destination(&row->tuple.dst))
		return;
	row->conn_id = next_conn_id();
	row->ts = bpf_ktime_get_boot_ns();
	row->visited = control(CONTROL_WALK);
	row->flags |= FLAG_COUNTED;
	if (state != BPF_TCP_SYN_SENT)
		row->flags |= FLAG_ESTABLISHED;
	join(sk, &connection, false);
#if !INCLUDE_LOOPBACK
	if (is_loopback(&row->tuple.dst) && !(row->nat & (NAT_DNAT | NAT_SNAT)))
		return; /* left out by default: not offered */
#endif
	/* What was before the tracer is not counted: it is as if it had been reported. */
	read_totals(sk, &connection.reported);
	error = insert_old(sk, &connection);
	if (error == -EEXIST)
		return; /* its tracepoint has just counted it */
	count(COUNT_ADOPTED);
	if (error)
		crowd_out(sk);
}

/* Whether a connection gets a row now: just one, however often the walk is repeated. */
static __always_inline bool due(const struct connection *connection, __u64 mode)
{
	return mode == MODE_REPORT && connection->row.ts <= control(CONTROL_DUE);
}

/* Interim rows leave half of the ring to closing rows, which cannot wait. */
static __always_inline void visit(const void *sk)
{
	struct connection *connection;
	__u64 mode;
	__u8 state;

	READ(state, sk, OFFSET_sock_common__skc_state);
	mode = control(CONTROL_MODE);
	if (state == BPF_TCP_LISTEN) {
		if (mode == MODE_ADOPT)
			remember_listener(sk);
		return;
	}
	if (state == BPF_TCP_CLOSE)
		return; /* it had its last row */
	connection = find_connection(sk);
	if (!connection) {
		if (mode == MODE_ADOPT)
			adopt(sk, state);
		return; /* otherwise: not traced, or counted as lost when it began */
	}
	connection->row.visited = control(CONTROL_WALK);
	if (!is_entry_of(sk, sk, connection))
		return; /* an entry of another socket is counted when this one ends */
	/* A connect that hangs claims its translation here, so that nobody takes it for another node's. */
	if (state == BPF_TCP_SYN_SENT)
		join_again(sk, connection);
	if (!due(connection, mode))
		return;
	join_again(sk, connection);
	if (unwanted(&connection->row)) { /* by option; counted when it ends */
		if (connection->row.flags & FLAG_ESTABLISHED)
			connection->row.ts = bpf_ktime_get_boot_ns(); /* not asked for again and again */
		grow_old(sk, state);
		return;
	}
	if (bpf_ringbuf_query(RECORDS, BPF_RB_AVAIL_DATA) < RING_BYTES / 2 &&
	    emit(sk, connection, bpf_ktime_get_boot_ns(), RESULT_OPEN, 0)) {
		count(COUNT_INTERIM);
		grow_old(sk, state);
	} else {
		count(COUNT_DEFERRED);
	}
}

#endif
