module behaviourclient

go 1.24
