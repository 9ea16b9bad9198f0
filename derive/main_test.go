package derive

import (
	"bytes"
	"context"
	"encoding/hex"
	"fmt"
	"os"
	"testing"
)

// The test binary is the keyholder and the small programs that tests look at from outside, by its first argument.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		if program := programs[os.Args[1]]; program != nil {
			if err := program(os.Args[2:]); err != nil {
				fmt.Fprintln(os.Stderr, os.Args[1]+":", err)
				os.Exit(1)
			}
			os.Exit(0)
		}
	}
	os.Exit(m.Run())
}

var programs = map[string]func(args []string) error{
	"keyholder-serve": func([]string) error { return ServeHolder(HolderPageFD, HolderSocketFD) },
}

var holderCommand = []string{"/proc/self/exe", "keyholder-serve"}

// testMaster returns master number n: octets that appear nowhere by chance.
func testMaster(t testing.TB, n byte) Master {
	t.Helper()
	octets := make([]byte, MasterSize)
	for i := range octets {
		octets[i] = 0xa1 + n*0x10 + byte(i)*7
	}
	m, err := NewMaster(octets)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func testSchedule(t testing.TB, n byte) *Schedule {
	t.Helper()
	s, err := NewSchedule(testMaster(t, n))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func testPage(t testing.TB, masters ...Master) *os.File {
	t.Helper()
	f, err := NewPage()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	if len(masters) > 0 {
		if err := FillPage(f, masters); err != nil {
			t.Fatal(err)
		}
	}
	return f
}

func testHolder(t testing.TB, page *os.File) *Holder {
	t.Helper()
	h, err := StartHolder(context.Background(), page, HolderConfig{Command: holderCommand})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = h.Close() })
	return h
}

func octetsOf(t testing.TB, key interface{ Octets() ([]byte, error) }) []byte {
	t.Helper()
	b, err := key.Octets()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func wantOctets(t testing.TB, what string, got, want []byte) {
	t.Helper()
	if !bytes.Equal(got, want) {
		t.Errorf("%s: got %x, want %x", what, got, want)
	}
}
