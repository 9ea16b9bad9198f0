package tpm2test

import "syscall"

// diesWithTest ends swtpm with a test binary that is killed.
func diesWithTest() *syscall.SysProcAttr { return &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} }
