/* The flag protocol of the layer (docs/protocol.md), every interleaving of it.
 *
 * A rank runs CALLS calls. In each it writes its rows into every rank's received block, raises its
 * dispatch flag at every rank, waits for all dispatch flags, reads what it received, writes the
 * results into every rank's home rows, raises its combine flag at every rank, waits for all combine
 * flags and reads its home rows. There is one buffer, used by every call.
 *
 * The rows of a rank and its flags come in two parts, as from two blocks of a grid: a flag is 2e - 1
 * while only one of them has added to it, 2e once it stands for call e.
 *
 * Memory is sequentially consistent here: that data lies before its flag is what the release and
 * acquire of the kernels give, and the FLAG_BEFORE_DATA break shows that the model needs it.
 *
 *   -DRANKS=2|3       ranks
 *   -DCALLS=n         calls of each rank
 *   -DKILLS=n         how many ranks may die, each before any step
 *   -DLAG             a deadline may pass at any wait, also when the peer is merely slow;
 *                     without it a deadline passes only where the flag can no longer come, so that
 *                     a wait with no end shows as a deadlock
 *   -DBREAK_...       one deliberate fault each; the checker must find every one of them
 */
#ifndef RANKS
#define RANKS 2
#endif
#ifndef CALLS
#define CALLS 2
#endif
#ifndef KILLS
#define KILLS 0
#endif

#define TORN 255 /* a block that is being written */

/* What lies in symmetric memory: AT(kind, r, s) at rank r, written by rank s alone. */
#define RECEIVED 0      /* the call whose rows block s of rank r holds */
#define HOME 1          /* the call whose results of rank s rank r holds */
#define DISPATCH_FLAG 2 /* twice the last call of which s raised its flag at r, one less if half */
#define COMBINE_FLAG 3
#define AT(kind, r, s) cell[((kind) * RANKS + (r)) * RANKS + (s)]
#define TOLD(r, f) told[(r) * RANKS + (f)]

byte cell[4 * RANKS * RANKS];
bool told[RANKS * RANKS]; /* TOLD(r, f): the abort record of finder f lies at rank r */

bool dead[RANKS];         /* killed */
bool left[RANKS];         /* ended by an abort, its own or one that it was told of */
bool finished[RANKS];     /* ran all its calls */
bool expired[RANKS];      /* its own deadline passed */
byte kills = KILLS;

#ifdef BREAK_HALF_A_FLAG
#define WANTED(e) >= 2 * e - 1
#else
#define WANTED(e) == 2 * e
#endif

#if RANKS == 2
#define ALL(flag, e) (AT(flag, me, 0) WANTED(e) && AT(flag, me, 1) WANTED(e))
#define ABORTED (TOLD(me, 0) || TOLD(me, 1))
#define ENDED(r) (dead[r] || left[r] || finished[r])
#define ALL_ENDED (ENDED(0) && ENDED(1))
#define LOST(flag, e) ((dead[0] || left[0]) && AT(flag, me, 0) != 2 * e || \
                       (dead[1] || left[1]) && AT(flag, me, 1) != 2 * e)
#define NOT_AHEAD(flag, e) (AT(flag, me, 0) <= 2 * e && AT(flag, me, 1) <= 2 * e)
#else
#define ALL(flag, e) (AT(flag, me, 0) WANTED(e) && AT(flag, me, 1) WANTED(e) && AT(flag, me, 2) WANTED(e))
#define ABORTED (TOLD(me, 0) || TOLD(me, 1) || TOLD(me, 2))
#define ENDED(r) (dead[r] || left[r] || finished[r])
#define ALL_ENDED (ENDED(0) && ENDED(1) && ENDED(2))
#define LOST(flag, e) ((dead[0] || left[0]) && AT(flag, me, 0) != 2 * e || \
                       (dead[1] || left[1]) && AT(flag, me, 1) != 2 * e || \
                       (dead[2] || left[2]) && AT(flag, me, 2) != 2 * e)
#define NOT_AHEAD(flag, e) \
  (AT(flag, me, 0) <= 2 * e && AT(flag, me, 1) <= 2 * e && AT(flag, me, 2) <= 2 * e)
#endif

#ifdef LAG
#define MAY_EXPIRE(flag, e) (!ALL(flag, e))
#else
#define MAY_EXPIRE(flag, e) (!ALL(flag, e) && LOST(flag, e))
#endif

/* Death is one more way for any step to go. */
#define OR_DIE :: atomic { kills > 0 -> kills--; dead[me] = true; goto out }

/* One step of every rank's: any other rank can look before and after. */
inline at_every_rank(memory, value) {
  i = 0;
  do
  :: i < RANKS -> if :: AT(memory, i, me) = value OR_DIE fi; i++
  :: else -> break
  od;
  i = 0
}

inline write_and_raise(memory, flag) {
#ifdef BREAK_FLAG_BEFORE_DATA
  at_every_rank(flag, 2 * call);
  at_every_rank(memory, TORN);
  at_every_rank(memory, call)
#else
  at_every_rank(memory, TORN);
  at_every_rank(flag, 2 * call - 1); /* one block is done */
  at_every_rank(memory, call);
  at_every_rank(flag, 2 * call)
#endif
}

/* The bytes of each block are looked at one block after another; a peer may run in between. */
inline read_blocks(memory) {
  i = 0;
  do
  :: i < RANKS ->
     if :: assert(AT(memory, me, i) == call) OR_DIE fi;
     i++
  :: else -> break
  od;
  i = 0
}

/* Ends in one of three ways: every flag is there, somebody's abort is seen, the deadline passes. */
inline wait_for_all(flag) {
  if
  :: atomic { ALL(flag, call) -> assert(NOT_AHEAD(flag, call)) }
  :: ABORTED -> goto leave
#ifndef BREAK_NO_DEADLINE
  :: MAY_EXPIRE(flag, call) -> goto expire
#endif
  OR_DIE
  fi
}

active [RANKS] proctype rank() {
  byte me = _pid;
  byte call = 1;
  byte i = 0;

  do
  :: call <= CALLS ->
     /* A call begins by looking whether an earlier one failed. */
     if
     :: ABORTED -> goto leave
     :: !ABORTED
     OR_DIE
     fi;

     write_and_raise(RECEIVED, DISPATCH_FLAG);
     wait_for_all(DISPATCH_FLAG);
     read_blocks(RECEIVED);           /* rows are laid out by expert */

#ifdef BREAK_COMBINE_FLAG_BEFORE_READ
     write_and_raise(HOME, COMBINE_FLAG);
     read_blocks(RECEIVED);
#else
     read_blocks(RECEIVED);           /* the combine reads whose tokens these were */
     write_and_raise(HOME, COMBINE_FLAG);
#endif
#ifndef BREAK_NO_COMBINE_WAIT
     wait_for_all(COMBINE_FLAG);
#else
     /* Waits for one flag, its own: what a rank would do that trusts only its own results. */
     if :: AT(COMBINE_FLAG, me, me) == 2 * call OR_DIE fi;
#endif
#ifndef BREAK_NO_COMBINE_WAIT
     read_blocks(HOME);
#endif
     call++
  :: else -> break
  od;
  finished[me] = true;
  goto out;

expire:
  expired[me] = true;
  i = 0;
  do
  :: i < RANKS ->
#ifdef BREAK_ABORT_STAYS_LOCAL
     if
     :: i == me -> TOLD(i, me) = true
     :: i != me
     OR_DIE
     fi;
#else
     if :: TOLD(i, me) = true OR_DIE fi;
#endif
     i++
  :: else -> break
  od;
  i = 0;

leave:
  left[me] = true;

out:
  skip
}

/* When every rank has come to its end: what each must know. */
active proctype afterwards() {
  byte r = 0;
  byte f = 0;
  atomic {
    ALL_ENDED ->
    do
    :: f < RANKS ->
       r = 0;
       do
       :: r < RANKS ->
          /* An abort reaches every rank, also one that had finished: its next call sees it. */
          assert(!(expired[f] && !dead[f]) || dead[r] || TOLD(r, f));
          /* Whoever left had a reason that it can name. */
          assert(!left[r] || TOLD(r, 0) || TOLD(r, 1)
#if RANKS == 3
                 || TOLD(r, 2)
#endif
          );
#if KILLS == 0
#ifndef LAG
          /* Nobody died and nobody was late: nobody may have given up. */
          assert(finished[r]);
#endif
#endif
          r++
       :: else -> break
       od;
       f++
    :: else -> break
    od
  }
}
