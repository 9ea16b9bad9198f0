package main

import (
	"context"
	"crypto/rand"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"keybroker/internal/config"
	"keybroker/seal"
	"keybroker/seal/passphrase"
	"keybroker/seal/tpm2"
	"keybroker/seal/tpm2/tpm2test"
)

// realmWith makes a realm file with one slot, and returns its path.
func realmWith(t *testing.T, kind string, p seal.Protector) string {
	t.Helper()
	master := make([]byte, seal.MasterSize)
	rand.Read(master)
	realm, err := seal.Create(master, realmIDOf)
	if err != nil {
		t.Fatal(err)
	}
	defer realm.Close()
	if _, err := realm.AddSlot(t.Context(), kind, p); err != nil {
		t.Fatal(err)
	}
	paths := config.Paths{Realm: filepath.Join(t.TempDir(), "realm.json")}
	l, err := lockRealm(t.Context(), paths)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := l.Create(realm, nil); err != nil {
		t.Fatal(err)
	}
	return paths.Realm
}

// A missing TPM is wrong where one opens the realm, and where there is no realm yet.
func TestDoctorTPM(t *testing.T) {
	none := filepath.Join(t.TempDir(), "tpmrm0")
	if f := checkTPM(none, filepath.Join(t.TempDir(), "realm.json")); f.ok || !strings.Contains(f.mend, "--slot passphrase") {
		t.Errorf("no realm: %+v", f)
	}
	get := func(context.Context) ([]byte, error) { return []byte(rightPhrase), nil }
	p, err := passphrase.New(passphrase.Config{Time: 1, MemoryKiB: 8 << 10, Threads: 1, Ask: get, AskNew: get})
	if err != nil {
		t.Fatal(err)
	}
	if f := checkTPM(none, realmWith(t, passphrase.Kind, p)); !f.ok || !strings.Contains(f.got, "no keyslot needs it") {
		t.Errorf("a passphrase slot alone: %+v", f)
	}
	pcrs, err := tpm2.ParseSelection(defaultPCRs)
	if err != nil {
		t.Fatal(err)
	}
	chip := tpm2test.Start(t)
	tpm, err := tpm2.New(tpm2.Config{Path: chip.Path, PCRs: pcrs})
	if err != nil {
		t.Fatal(err)
	}
	realm := realmWith(t, tpm2.Kind, tpm)
	if f := checkTPM(none, realm); f.ok {
		t.Errorf("a TPM slot: %+v", f)
	}
	if f := checkTPM(chip.Path, realm); !f.ok {
		t.Errorf("a TPM that is there: %+v", f)
	}
}

// A host without VMs is in order, unless broker.toml speaks of libvirt.
func TestDoctorLibvirt(t *testing.T) {
	none, program := filepath.Join(t.TempDir(), "none"), filepath.Join(t.TempDir(), "libvirtd")
	if err := os.WriteFile(program, nil, 0o755); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(t.TempDir(), "sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	libvirt := func(found []finding) finding {
		for _, f := range found {
			if f.what == "libvirt" {
				return f
			}
		}
		return finding{}
	}
	if found := checkVMs(t.Context(), nil, []string{program}); found != nil {
		t.Errorf("libvirt = []: %+v", found)
	}
	byDefault := config.Default().Libvirt
	if found := checkVMs(t.Context(), byDefault, []string{none}); !exists(byDefault[0]) && !exists(byDefault[1]) &&
		(len(found) != 1 || !found[0].ok || found[0].got != "no libvirt on this host") {
		t.Errorf("nothing of libvirt: %+v", found)
	}
	if found := checkVMs(t.Context(), byDefault, []string{none, program}); len(found) != 4 {
		t.Errorf("its program is here: %+v", found)
	}
	if found := checkVMs(t.Context(), []string{none}, []string{none}); len(found) != 4 || libvirt(found).ok {
		t.Errorf("configured, and not there: %+v", found)
	}
	if found := checkVMs(t.Context(), []string{none, socket}, nil); len(found) != 4 || !libvirt(found).ok {
		t.Errorf("there: %+v", found)
	}
}
