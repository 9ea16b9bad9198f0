package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"keybroker/internal/tuple"
	"keybroker/seal/passphrase"
	"keybroker/seal/tpm2/tpm2test"
)

// noRaceWait keeps the race detector from waiting a second at every program's end for races that are still to come.
const noRaceWait = "atexit_sleep_ms=0"

func TestMain(m *testing.M) {
	os.Setenv("GORACE", noRaceWait)
	testscript.Main(m, map[string]func(){"keybroker": cheapMain, "bring-passphrase": bringPassphraseMain})
}

// cheapMain is main, with passphrase slots that take milliseconds also under the race detector.
func cheapMain() {
	newSlotCost = passphrase.Config{Time: 1, MemoryKiB: 8 << 10, Threads: 1}
	main()
}

// bringPassphraseMain is a client of an opener: the socket is its argument.
func bringPassphraseMain() {
	if err := bringPassphrase(context.Background(), os.Args[1], []byte(rightPhrase)); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}

type scriptKey struct{}

// scriptTPMs are the software TPMs of one script.
type scriptTPMs struct {
	t    testing.TB
	tpms map[string]*tpm2test.TPM
}

func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Setup: func(e *testscript.Env) error {
			e.Setenv("GORACE", noRaceWait)
			e.Values[scriptKey{}] = &scriptTPMs{t: e.T().(testing.TB), tpms: make(map[string]*tpm2test.TPM)}
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"swtpm":  scriptSWTPM,
			"extend": scriptExtend,
			"reboot": scriptReboot,
			"edit":   scriptEdit,
			"setup":  scriptFile,
		},
	})
}

func tpmOf(ts *testscript.TestScript, name string) *tpm2test.TPM {
	s := ts.Value(scriptKey{}).(*scriptTPMs)
	if s.tpms[name] == nil {
		s.tpms[name] = tpm2test.Start(s.t)
	}
	return s.tpms[name]
}

// swtpm NAME starts a software TPM; $NAME is its socket.
func scriptSWTPM(ts *testscript.TestScript, _ bool, args []string) {
	ts.Setenv(args[0], tpmOf(ts, args[0]).Path)
}

// extend NAME PCR extends a PCR.
func scriptExtend(ts *testscript.TestScript, _ bool, args []string) {
	pcr, err := strconv.Atoi(args[1])
	ts.Check(err)
	tpmOf(ts, args[0]).Extend(pcr)
}

// reboot NAME starts the TPM anew.
func scriptReboot(ts *testscript.TestScript, _ bool, args []string) { tpmOf(ts, args[0]).Reboot() }

// edit FILE OLD NEW replaces text in a realm file and gives it a right checksum.
func scriptEdit(ts *testscript.TestScript, _ bool, args []string) {
	path := ts.MkAbs(args[0])
	octets, err := os.ReadFile(path)
	ts.Check(err)
	if !bytes.Contains(octets, []byte(args[1])) {
		ts.Fatalf("%s has no %q", args[0], args[1])
	}
	edited := strings.Replace(string(octets), args[1], args[2], 1)
	body := edited[:strings.LastIndex(edited, ",\n  \"sum\"")]
	sum := sha256.Sum256(tuple.Encode([]byte("keybroker/v1 realm sum"), []byte(body)))
	edited = body + ",\n  \"sum\": \"" + hex.EncodeToString(sum[:]) + "\"\n}\n"
	ts.Check(os.WriteFile(path, []byte(edited), 0o600))
}

// setup NAME OCTETS makes a file of so many octets "k", without a newline.
func scriptFile(ts *testscript.TestScript, _ bool, args []string) {
	n, err := strconv.Atoi(args[1])
	ts.Check(err)
	octets := make([]byte, n)
	for i := range octets {
		octets[i] = byte('a' + i%20)
	}
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), octets, 0o600))
}
