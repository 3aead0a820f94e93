/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* Everything that is counted, once: the C side indexes the per-CPU array with it, the Python side
 * (tracer/record.py, class Counter) has the same names in the same order, and a test compares them.
 *
 * The accounts that must balance:
 * connections of local TCP sockets:
 *   opened + accepted + adopted + late_begin + failed
 *       = closed + lost_ring + lost_connection_map + lost_end + excluded + (still open)
 * entries that only conntrack tells of, when they end (flow.h):
 *   flows = rows of closed flows + lost_flow_ring + withdrawn + (provisional)
 * A provisional row that found the ring full is in none of them until user space or the next entry of its tuple knows
 * that no socket has claimed its entry (ENDED_UNTOLD).
 */
#ifndef TRACER_COUNTERS_H
#define TRACER_COUNTERS_H

enum counter {
	COUNT_OPENED,		    /* connections that began: a local socket entered SYN_SENT */
	COUNT_CLOSED,		    /* closing records handed to the ring */
	COUNT_CONNTRACK_NEW,	    /* conntrack entries born while we listened */
	COUNT_CONNTRACK_DESTROY,    /* conntrack entries that ended while we listened */
	COUNT_ADOPTED,		    /* connections found at the start by the socket iterator */
	COUNT_INTERIM,		    /* interim records handed to the ring */
	COUNT_EXCLUDED,		    /* dropped after it began: a loopback connection without a rewrite */
	COUNT_LOST_RING,	    /* LOST: closing records that found the ring full */
	COUNT_LOST_CONNECTION_MAP,  /* LOST: connections that found the connection map full */
	COUNT_LOST_TRANSLATION_MAP, /* LOST: translations that found the translation map full */
	COUNT_DEFERRED,		    /* interim records that found the ring full: the next row carries them */
	COUNT_LOST_END, /* LOST: closing records nobody made: the socket is gone or another's, its entry was still there */
	COUNT_LATE_BEGIN,	/* connections whose SYN_SENT was missed (tracer.c), taken at their next state */
	COUNT_LATE_END,		/* connections whose CLOSE was missed (tracer.c), taken when the socket was destroyed */
	COUNT_UNRESOLVED,	/* closing records whose translation is unknown */
	COUNT_AMBIGUOUS,	/* joins refused: one tuple open in two namespaces, or in two zones */
	COUNT_AFTER_PAUSE,	/* connections that began while the tracer was stopping: in no row */
	COUNT_IGNORED_PROTOCOL, /* conntrack events of protocols that are not traced */
	COUNT_MALFORMED_EVENTS, /* conntrack events whose layout was not understood */
	COUNT_STALE_DESTROY,	/* DESTROY of an entry that was not, or no longer, in the map */
	COUNT_KEPT,		/* entries that conntrack dropped before their socket was done with them, kept for it */
	COUNT_ACCEPTED,		/* connections that a local socket accepted (role server) */
	COUNT_FAILED,		/* connects that failed before SYN_SENT: no route, no permission (connect probe) */
	COUNT_FLOWS,		/* flows that ended: entries claimed by no TCP socket that get a row (flow.h) */
	COUNT_LOST_FLOW_RING,	/* LOST: closing records of flows that found the ring full */
	COUNT_TRANSIT, /* entries that ended, without a row: no local socket's, and this node rewrote no destination */
	COUNT_LOST_OWNER_MAP, /* LOST: processes of UDP sockets that found the owner map full: their rows are forwarded */
	COUNT_LOST_DIAL_MAP,	 /* LOST: addresses given to connect() that found the dial map full */
	COUNT_LOST_LISTENER_MAP, /* LOST: ports with a listener that found no room at the start: see LISTENERS */
	COUNT_UNDIALLED, /* connections without the address given to connect(), where that may have been rewritten */
	COUNTERS
};

#endif
