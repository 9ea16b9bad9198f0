//go:build cgo

package derive

// A program that is linked with a C library (the race detector needs one; releases are built without) starts its threads
// through it, which takes more calls.
var libraryCalls = []string{"brk", "mremap", "rseq", "sched_getaffinity", "set_robust_list"}

// libraryAttempts are calls that a C library makes and can do without. They fail and do not kill: clone3, whose flags lie
// out of a filter's sight, gives way to clone, and openat, to count processors, to nothing.
var libraryAttempts = []string{"clone3", "openat"}
