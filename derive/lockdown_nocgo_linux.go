//go:build !cgo

package derive

// libraryCalls and libraryAttempts are for programs with a C library.
var libraryCalls, libraryAttempts []string
