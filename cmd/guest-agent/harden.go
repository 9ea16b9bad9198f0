//go:build linux

package main

import (
	"fmt"
	"runtime/debug"

	"golang.org/x/sys/unix"
)

// The agent needs little: the limit makes the collector run before the heap grows.
const memoryLimit = 8 << 20

// harden keeps the agent's memory out of core dumps, other processes and swap. What cannot be had is a warning: a key is only
// in memory for a moment.
func harden(out *console) {
	debug.SetMemoryLimit(memoryLimit)
	warn := func(what string, err error) {
		if err != nil {
			out.say("warning: %s: %v", what, err)
		}
	}
	warn("switching off core dumps", unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}))
	warn("switching off tracing", unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0))
	warn("renouncing further privileges", unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
	warn("keeping memory out of swap", unix.Mlockall(unix.MCL_CURRENT|unix.MCL_FUTURE|unix.MCL_ONFAULT))
}

// awaitRandom waits until the kernel's random number generator is ready: keys made before are guessable.
func awaitRandom(out *console) error {
	b := make([]byte, 1)
	for _, flags := range []int{unix.GRND_NONBLOCK, 0} {
		_, err := unix.Getrandom(b, flags)
		if err == nil {
			return nil
		}
		if flags == 0 || err != unix.EAGAIN {
			return fmt.Errorf("asking for random octets: %w", err)
		}
		out.say("waiting for the kernel's random number generator; <rng model='virtio'> in the domain makes it quick")
	}
	return nil
}
