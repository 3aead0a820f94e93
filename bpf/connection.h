/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* The life of one TCP connection of a local socket, from SYN_SENT to CLOSE, and its rows. */
#ifndef TRACER_CONNECTION_H
#define TRACER_CONNECTION_H

#include "kernel.h"

static __always_inline bool wanted_netns(__u32 netns)
{
#if NETNS_FILTER == 0
	return true;
#else
	bool listed = bpf_map_lookup_elem_(NETNS_LIST, &netns) != NULL;

	return NETNS_FILTER == 1 ? listed : !listed;
#endif
}

/* Unique for this agent run, and in practice across runs: run (16 bits), CPU (12), origin (2), sequence (34). */
static __always_inline __u64 next_conn_id(__u32 origin)
{
	__u64 *sequence = bpf_map_lookup_elem_(SEQUENCE, &origin);

	if (!sequence)
		return 0; /* cannot be: the array has a slot for each origin */
	*sequence += 1;	  /* no program interrupts itself, so nobody else writes this slot meanwhile */
	return (__u64)RUN_ID << 48 | (__u64)(bpf_get_smp_processor_id() & 0xfff) << 36 | (__u64)origin << 34 |
	       (*sequence & ((1ULL << 34) - 1));
}

/* The node's translation of a tuple: zone 0 first, else another zone if exactly one matches. */
static __always_inline struct translation *find_translation(struct tuple *tuple)
{
	struct translation *found = bpf_map_lookup_elem_(TRANSLATIONS, tuple);
	struct tuple zoned;
	int matches = 0;

	if (found)
		return found;
	zoned = *tuple;
#pragma unroll
	for (__u32 i = 0; i < ZONES; i++) {
		__u32 slot = i, *zone = bpf_map_lookup_elem_(ZONES_SEEN, &slot);
		struct translation *in_zone;

		if (!zone || !*zone)
			break; /* slots are filled in order: no further zone was seen */
		zoned.zone = *zone;
		in_zone = bpf_map_lookup_elem_(TRANSLATIONS, &zoned);
		if (in_zone) {
			found = in_zone;
			matches++;
		}
	}
	if (matches > 1) {
		count(COUNT_AMBIGUOUS);
		return NULL;
	}
	return found;
}

/* Whether another socket has claimed this translation and is still open: then one tuple is open in two
 * namespaces, and whose the entry is cannot be told. */
static __always_inline bool claimed_by_another(const struct translation *translation, __u64 conn_id)
{
	__u64 socket = translation->socket;
	struct connection *other;

	if (!translation->conn_id || translation->conn_id == conn_id)
		return false;
	other = bpf_map_lookup_elem_(CONNECTIONS, &socket);
	return other && other->row.conn_id == translation->conn_id;
}

/* Fills the row's translation, if it is known. Asked once the connection stands and, if that found nothing,
 * again at each row. */
static __always_inline void join(const void *sk, struct record *row)
{
	struct translation *translation;

	/* Another namespace's loopback never leaves it; the node's own may carry the same tuple. */
	if (is_loopback(&row->tuple.src) && row->netns != NODE_NETNS) {
		row->nat = NAT_NONE;
		row->backend = row->tuple.dst;
		row->backend_port = row->tuple.dst_port;
		return;
	}
	translation = find_translation(&row->tuple);
	if (!translation)
		return; /* unknown, and the row says so: no loss */
	if (claimed_by_another(translation, row->conn_id)) {
		count(COUNT_AMBIGUOUS);
		return;
	}
	translation->conn_id = row->conn_id;
	translation->socket = (__u64)sk;
	row->backend = translation->backend;
	row->backend_port = translation->backend_port;
	row->snat = translation->snat;
	row->snat_port = translation->snat_port;
	row->ct_id = translation->ct_id;
	row->ct_zone = translation->zone;
	row->nat = translation->nat;
	row->nat_source = translation->source;
	if (translation->ended)
		bpf_map_delete_elem_(TRANSLATIONS, &row->tuple);
}

/* What is known of a socket when its entry is made. False: it is not traced, by option. */
static __always_inline bool describe(const void *sk, struct record *row)
{
	if (!read_tuple(sk, &row->tuple))
		return false;
	row->netns = read_netns(sk);
	if (!wanted_netns(row->netns))
		return false;
#if !INCLUDE_LOOPBACK
	/* In the node's namespace a loopback destination may be a NodePort: decided when it stands. */
	if (is_loopback(&row->tuple.dst) && row->netns != NODE_NETNS)
		return false;
#endif
	row->role = ROLE_CLIENT;
	row->result = RESULT_OPEN;
	if (is_v4(&row->tuple.dst))
		row->flags = FLAG_IPV4;
	return true;
}

/* Whether an entry is this socket's. It is not where the end of an earlier socket at this address was missed. */
static __always_inline bool is_entry_of(const void *sk, const struct record *row)
{
	__u16 port;

	READ(port, sk, OFFSET_sock_common__skc_dport);
	if (port != row->tuple.dst_port)
		return false;
	if (!row->tuple.src_port)
		return true; /* not known yet */
	READ(port, sk, OFFSET_inet_sock__inet_sport);
	return port == row->tuple.src_port;
}

static __always_inline long insert(const void *sk, struct connection *connection)
{
	__u64 key = (__u64)sk;
	long error = bpf_map_update_elem_(CONNECTIONS, &key, connection, BPF_NOEXIST);

	if (error == -EEXIST) {
		count(COUNT_LOST_END);
		error = bpf_map_update_elem_(CONNECTIONS, &key, connection, BPF_ANY);
	}
	return error;
}

/* CLOSE -> SYN_SENT, in the context of the caller of connect(). */
static __always_inline void connection_begins(const void *sk)
{
	struct connection connection = {};
	struct record *row = &connection.row;

	if (!describe(sk, row))
		return; /* filtered by option: not offered */
	if (control(CONTROL_PAUSE)) {
		count(COUNT_AFTER_PAUSE);
		return;
	}
	count(COUNT_OPENED);
	row->conn_id = next_conn_id(ORIGIN_TRACEPOINT);
	row->started = row->ts = bpf_ktime_get_boot_ns();
	row->flags |= FLAG_OPENED | FLAG_PROCESS | FLAG_COUNTED;
	row->pid = bpf_get_current_pid_tgid() >> 32;
	row->cgroup_id = bpf_get_current_cgroup_id();
	bpf_get_current_comm(row->comm, sizeof(row->comm));
	if (insert(sk, &connection))
		count(COUNT_LOST_CONNECTION_MAP);
}

/* A connection that leaves SYN_SENT and has no entry: its beginning was missed (tracer.c), and nothing of it has been
 * reported. When it began and whose process dialled are not known. */
static __always_inline struct connection *connection_began(const void *sk, __u64 *key)
{
	struct connection connection = {};
	struct record *row = &connection.row;

	if (control(CONTROL_PAUSE) || !describe(sk, row))
		return NULL; /* not offered, or counted when it began */
	row->conn_id = next_conn_id(ORIGIN_TRACEPOINT);
	row->ts = bpf_ktime_get_boot_ns();
	row->flags |= FLAG_OPENED | FLAG_COUNTED;
	if (bpf_map_update_elem_(CONNECTIONS, key, &connection, BPF_NOEXIST))
		return NULL; /* the map is full: counted when it began */
	count(COUNT_LATE_BEGIN);
	return bpf_map_lookup_elem_(CONNECTIONS, key);
}

/* SYN_SENT -> ESTABLISHED: the source port is known now, and conntrack confirmed the entry before the SYN left. */
static __always_inline void connection_stands(const void *sk)
{
	__u64 key = (__u64)sk;
	struct connection *connection = bpf_map_lookup_elem_(CONNECTIONS, &key);
	struct record *row;

	if (!connection)
		connection = connection_began(sk, &key);
	if (!connection)
		return; /* not traced, or counted as lost when it began */
	row = &connection->row;
	READ(row->tuple.src_port, sk, OFFSET_inet_sock__inet_sport);
	row->flags |= FLAG_ESTABLISHED;
	if (row->started) {
		row->connect_latency_us = (bpf_ktime_get_boot_ns() - row->started) / 1000;
		row->flags |= FLAG_LATENCY;
	}
	join(sk, row);
#if !INCLUDE_LOOPBACK
	if (is_loopback(&row->tuple.dst) && !(row->nat & (NAT_DNAT | NAT_SNAT))) {
		bpf_map_delete_elem_(CONNECTIONS, &key);
		count(COUNT_EXCLUDED);
	}
#endif
}

/* The source port, of a connection that has not stood so far, or of which that was missed. */
static __always_inline void learn_port(const void *sk, struct record *row)
{
	if (!row->tuple.src_port)
		READ(row->tuple.src_port, sk, OFFSET_inet_sock__inet_sport);
}

/* One row: what is known, and what was added since the last one. False if the ring is full; then nothing of the
 * connection has changed and the next row carries it all. */
static __always_inline bool emit(const void *sk, struct connection *connection, __u64 now, __u16 result, __u8 flags)
{
	struct record *row = &connection->row, *record;
	struct reported totals = {};
	__u32 rtt;

	record = bpf_ringbuf_reserve(RECORDS, sizeof(*record), 0);
	if (!record)
		return false;
	learn_port(sk, row);
	if (row->nat == NAT_UNKNOWN)
		join(sk, row);
	read_totals(sk, &totals);
	/* What is sent again is counted before it is sent, so a total may fall back: no row holds less than none. */
	if (totals.bytes_sent < connection->reported.bytes_sent)
		totals.bytes_sent = connection->reported.bytes_sent;
	if (totals.bytes_received < connection->reported.bytes_received)
		totals.bytes_received = connection->reported.bytes_received;
	READ(rtt, sk, OFFSET_tcp_sock__srtt_us);
	*record = *row;
	record->ts = now;
	record->duration_ns = now - row->ts;
	record->bytes_sent = totals.bytes_sent - connection->reported.bytes_sent;
	record->bytes_received = totals.bytes_received - connection->reported.bytes_received;
	record->packets_sent = (__u32)(totals.packets_sent - connection->reported.packets_sent);
	record->packets_received = (__u32)(totals.packets_received - connection->reported.packets_received);
	record->retransmits = totals.retransmits - connection->reported.retransmits;
	record->rtt_us = rtt >> 3; /* srtt_us is kept in eighths (tcp_input.c, tcp_rtt_estimator) */
	record->result = result;
	record->flags |= flags;
	bpf_ringbuf_submit(record, BPF_RB_NO_WAKEUP);
	connection->reported = totals;
	row->ts = now;
	row->flags &= ~(FLAG_OPENED | FLAG_LATENCY);
	return true;
}

/* How a connection ended. sk_err is set before the state changes (tcp_reset, tcp_write_err); it is 0 for a local
 * close and where no source port was left (tcp_v4_connect's failure path), which then is still 0. */
static __always_inline __u16 how_it_ended(const void *sk, const struct record *row)
{
	int error;

	READ(error, sk, OFFSET_sock__sk_err);
	if (error)
		return error;
	if (row->flags & FLAG_ESTABLISHED)
		return 0;
	return row->tuple.src_port ? RESULT_ABORTED : EADDRNOTAVAIL;
}

/* The last row, and the end of the entry. The socket's counters are still there. */
static __always_inline void finish(const void *sk, __u64 *key, struct connection *connection)
{
	struct record *row = &connection->row;

	if (!is_entry_of(sk, row)) {
		count(COUNT_LOST_END);
		goto out;
	}
	learn_port(sk, row);
#if !INCLUDE_LOOPBACK
	if (is_loopback(&row->tuple.dst)) {
		if (row->nat == NAT_UNKNOWN)
			join(sk, row);
		if (!(row->nat & (NAT_DNAT | NAT_SNAT))) {
			count(COUNT_EXCLUDED);
			goto out;
		}
	}
#endif
	if (emit(sk, connection, bpf_ktime_get_boot_ns(), how_it_ended(sk, row), FLAG_CLOSED)) {
		count(COUNT_CLOSED);
		if (row->nat == NAT_UNKNOWN)
			count(COUNT_UNRESOLVED);
	} else {
		count(COUNT_LOST_RING);
	}
out:
	bpf_map_delete_elem_(CONNECTIONS, key);
}

/* -> CLOSE, in any context. */
static __always_inline void connection_ends(const void *sk, int old_state)
{
	__u64 key = (__u64)sk;
	struct connection *connection = bpf_map_lookup_elem_(CONNECTIONS, &key);

	if (!connection && old_state == BPF_TCP_SYN_SENT)
		connection = connection_began(sk, &key);
	if (!connection)
		return; /* an accepted socket, not traced, or counted as lost when it began */
	/* Said here too: a simultaneous open skips SYN_SENT -> ESTABLISHED. */
	if (old_state != BPF_TCP_SYN_SENT && old_state != BPF_TCP_SYN_RECV)
		connection->row.flags |= FLAG_ESTABLISHED;
	finish(sk, &key, connection);
}

/* The socket is freed. Its entry is gone, unless its end was missed (tracer.c). */
static __always_inline void socket_vanishes(const void *sk)
{
	__u64 key = (__u64)sk;
	struct connection *connection = bpf_map_lookup_elem_(CONNECTIONS, &key);
	__u32 rtt;

	if (!connection)
		return; /* as it should be: no loss */
	count(COUNT_LATE_END);
	READ(rtt, sk, OFFSET_tcp_sock__srtt_us);
	if (rtt) /* measured by the handshake at the latest */
		connection->row.flags |= FLAG_ESTABLISHED;
	finish(sk, &key, connection);
}

#endif
