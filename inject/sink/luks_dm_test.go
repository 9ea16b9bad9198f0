//go:build linux

package sink

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// needMapper skips where no real volume can be opened.
func needMapper(t *testing.T) {
	t.Helper()
	needCryptsetup(t)
	control, err := os.OpenFile("/dev/mapper/control", os.O_RDWR, 0)
	if err == nil {
		err = control.Close()
	}
	if err != nil || os.Geteuid() != 0 {
		t.Skip("needs root and the device mapper with dm-crypt and loop: modprobe dm-crypt loop, or run this test in the lab")
	}
}

func loopDevice(t *testing.T, path string) string {
	t.Helper()
	out, err := exec.Command("losetup", "--find", "--show", path).CombinedOutput()
	if err != nil {
		t.Fatalf("losetup: %v: %s", err, out)
	}
	device := strings.TrimSpace(string(out))
	t.Cleanup(func() { exec.Command("losetup", "-d", device).Run() })
	return device
}

// newVolume is a sink on a fresh loop device.
func newVolume(t *testing.T, mapper string) *LUKS {
	t.Helper()
	l := &LUKS{Device: loopDevice(t, blankDisk(t)), Mapper: mapper}
	l.Record = func(uuid string) error { l.Recorded = uuid; return nil }
	t.Cleanup(func() { exec.Command("cryptsetup", "close", mapper).Run() })
	return l
}

func closeVolume(t *testing.T, l *LUKS) {
	t.Helper()
	cryptsetup(t, nil, "close", l.Mapper)
}

func TestVolumeOpens(t *testing.T) {
	needMapper(t)
	ctx, k := context.Background(), newKey(1, true)
	l := newVolume(t, "kbtest-opens")
	if holds, err := l.Holds(); err != nil || holds {
		t.Fatalf("before: %v %v", holds, err)
	}
	r, err := l.Put(ctx, k)
	if err != nil || !r.Opened || !r.Formatted || r.Already || r.ID == "" {
		t.Fatalf("first boot: %+v %v", r, err)
	}
	text := []byte("written through the mapping")
	overwrite(t, "/dev/mapper/kbtest-opens", 4096, text)
	if holds, err := l.Holds(); err != nil || !holds {
		t.Fatalf("open: %v %v", holds, err)
	}
	again, err := l.Put(ctx, k)
	if err != nil || !again.Opened || !again.Already || again.ID != r.ID {
		t.Fatalf("asked again: %+v %v", again, err)
	}
	if _, err := l.Put(ctx, newKey(1, true)); !errors.Is(err, ErrWrongKey) {
		t.Fatalf("asked again with another key: %v", err)
	}
	status := cryptsetup(t, nil, "status", l.Mapper)
	if !strings.Contains(status, "aes-xts-plain64") || !strings.Contains(status, "512 bits") {
		t.Errorf("status: %s", status)
	}
	closeVolume(t, l)
	k.Create = false
	if r, err := l.Put(ctx, k); err != nil || !r.Opened || r.Formatted {
		t.Fatalf("second boot: %+v %v", r, err)
	}
	got := make([]byte, len(text))
	f, err := os.Open("/dev/mapper/kbtest-opens")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.ReadAt(got, 4096); err != nil || !bytes.Equal(got, text) {
		t.Errorf("read back %q, %v", got, err)
	}
}

func TestVolumeOfSomebodyElse(t *testing.T) {
	needMapper(t)
	ctx, k := context.Background(), newKey(1, true)
	l := newVolume(t, "kbtest-else")
	if _, err := l.Put(ctx, k); err != nil {
		t.Fatal(err)
	}
	l.Recorded = "" // as if this agent had not opened it
	if _, err := l.Put(ctx, k); !errors.Is(err, ErrTaken) {
		t.Errorf("opened by nobody known: %v", err)
	}
	other := newVolume(t, "kbtest-else")
	if _, err := other.Put(ctx, newKey(1, true)); !errors.Is(err, ErrNoVolume) {
		t.Errorf("the name of another volume, blank device: %v", err)
	}
	closeVolume(t, l)
}

func TestVolumeRefusals(t *testing.T) {
	needMapper(t)
	ctx, k := context.Background(), newKey(1, true)
	l := newVolume(t, "kbtest-refused")
	if _, err := l.Put(ctx, k); err != nil {
		t.Fatal(err)
	}
	closeVolume(t, l)
	if _, err := l.Put(ctx, newKey(1, true)); !errors.Is(err, ErrWrongKey) {
		t.Errorf("another key: %v", err)
	}
	rewrite(t, l.Device, func(m map[string]any) { dig(m, "segments", "0")["encryption"] = "cipher_null-ecb" })
	if _, err := l.Put(ctx, k); !errors.Is(err, ErrHeader) {
		t.Errorf("null cipher: %v", err)
	}
	if holds, err := l.Holds(); err != nil || holds {
		t.Errorf("after refusals: open %v, %v", holds, err)
	}
	l.Record = func(string) error { return errors.New("no record") }
	if _, err := newVolumeWith(t, l).Put(ctx, newKey(1, true)); err == nil {
		t.Error("opened without a record")
	}
}

// newVolumeWith is l on another fresh device.
func newVolumeWith(t *testing.T, l *LUKS) *LUKS {
	other := *l
	other.Device = loopDevice(t, blankDisk(t))
	return &other
}

func TestVolumeRekeysWhileOpen(t *testing.T) {
	needMapper(t)
	ctx := context.Background()
	old, new := newKey(1, true), newKey(2, false)
	l := newVolume(t, "kbtest-rekey")
	if _, err := l.Put(ctx, old); err != nil {
		t.Fatal(err)
	}
	var need *NeedEpochError
	if _, err := l.Put(ctx, new); !errors.As(err, &need) || need.Epoch != 1 {
		t.Fatalf("the next epoch: %v", err)
	}
	if err := l.Rekey(ctx, old, new); err != nil {
		t.Fatal(err)
	}
	if r, err := l.Put(ctx, new); err != nil || !r.Opened || !r.Already {
		t.Errorf("after Rekey, still open: %+v %v", r, err)
	}
	closeVolume(t, l)
	if r, err := l.Put(ctx, new); err != nil || !r.Opened || r.Already {
		t.Errorf("after Rekey, opened anew: %+v %v", r, err)
	}
	if _, err := l.Put(ctx, old); !errors.Is(err, ErrOldEpoch) {
		t.Errorf("the old key: %v", err)
	}
	closeVolume(t, l)
}

// Between the two steps of Rekey a volume has both keyslots; the next Put takes the old one out.
func TestVolumeAfterHalfRekey(t *testing.T) {
	needMapper(t)
	ctx := context.Background()
	old, new := newKey(1, true), newKey(2, false)
	l := newVolume(t, "kbtest-half")
	if _, err := l.Put(ctx, old); err != nil {
		t.Fatal(err)
	}
	closeVolume(t, l)
	newFile := t.TempDir() + "/key"
	if err := os.WriteFile(newFile, new.Octets(), 0o600); err != nil {
		t.Fatal(err)
	}
	cryptsetup(t, old.Octets(), "luksAddKey", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--key-file", "-", l.Device, newFile)
	cryptsetup(t, []byte(`{"type":"keybroker","keyslots":["1"],"name":"disk","epoch":2}`), "token", "import", "--json-file", "-", l.Device)
	r, err := l.Put(ctx, new)
	if err != nil || !r.Opened || r.Leftover != nil {
		t.Fatalf("%+v %v", r, err)
	}
	if dump := cryptsetup(t, nil, "luksDump", l.Device); strings.Contains(dump, "0: luks2") || !strings.Contains(dump, "1: luks2") {
		t.Errorf("luksDump: %s", dump)
	}
	closeVolume(t, l)
}

func TestPlainFileIsNoDevice(t *testing.T) {
	l := &LUKS{Device: formatted(t, newKey(1, true)), Mapper: "kbtest-file"}
	l.Record = func(string) error { t.Error("recorded"); return nil }
	if _, err := l.Put(context.Background(), newKey(1, false)); err == nil || !strings.Contains(err.Error(), "losetup") {
		t.Errorf("got %v", err)
	}
}
