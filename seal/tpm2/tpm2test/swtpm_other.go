//go:build !linux

package tpm2test

import "syscall"

func diesWithTest() *syscall.SysProcAttr { return nil }
